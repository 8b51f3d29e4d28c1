"""Clips and edits on the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from hydra_hf.cli import main
from hydra_hf.files import write_video
from hydra_hf.modeling.video_reading import read_video
from hydra_hf.pipelines.answering import answer


pytest.importorskip("av")


@pytest.fixture(scope="module")
def model(clip_pipeline, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clips") / "model"
    clip_pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    levels = np.random.default_rng(0).integers(0, 256, (9, 16, 32, 3), dtype=np.uint8)
    write_video(path, [Image.fromarray(frame) for frame in levels], fps=8)
    return path


def run(*arguments, model: str) -> int:
    return main([*map(str, arguments), "--model", model, "--device", "cpu"])


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_generate_writes_a_clip(model, tmp_path, capsys, suffix):
    out = tmp_path / f"clip{suffix}"
    assert run("generate", "a cat", "--num_frames", 5, "--height", 16, "--width", 16, "--out", out, model=model) == 0
    assert "5 frames, 16x16" in capsys.readouterr().out
    frames, _ = read_video(out, lambda metadata: range(metadata.total_num_frames))
    assert tuple(frames.shape) == (5, 3, 16, 16)


def test_edit_writes_an_image_of_the_aspect_of_its_source(model, picture, tmp_path, capsys):
    out = tmp_path / "edited.png"
    assert run("edit", picture, "make it red", "--out", out, model=model) == 0
    width, height = Image.open(out).size
    assert width > height
    assert f"{width}x{height}" in capsys.readouterr().out
    assert run("edit", picture, "make it red", "--out", out, "--json", "--seed", 3, model=model) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(out), "width": width, "height": height, "seed": 3}


def test_a_reference_changes_an_edit(model, picture, tmp_path):
    reference = tmp_path / "reference.png"
    Image.new("RGB", (16, 16), "orange").save(reference)
    edits = []
    for name, extra in (("plain.png", ()), ("referred.png", ("--reference", reference))):
        assert run("edit", picture, "make it red", "--out", tmp_path / name, *extra, model=model) == 0
        edits.append(np.asarray(Image.open(tmp_path / name)))
    assert edits[0].shape == edits[1].shape
    assert (edits[0] != edits[1]).any()


def test_a_clip_can_be_asked_about(model, clip_pipeline, clip, capsys):
    assert run("ask", clip, "what is in the picture", model=model) == 0
    (expected,) = answer(clip_pipeline.model, clip_pipeline.processor, [str(clip)], ["what is in the picture"])
    assert capsys.readouterr().out.strip() == expected


def test_reconstruct_writes_a_clip_and_how_near_it_is(model, clip, tmp_path, capsys):
    out = tmp_path / "again.mp4"
    assert run("reconstruct", clip, "--num_frames", 9, "--out", out, model=model) == 0
    assert "PSNR" in (line := capsys.readouterr().out)
    assert "9 frames" in line
    assert run("reconstruct", clip, "--num_frames", 9, "--out", out, "--json", model=model) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["path"], result["num_frames"], f"{result['psnr']:.2f}") == (str(out), 9, line.split()[1])


def test_a_long_clip_is_reconstructed_in_chunks_as_at_once(model, tmp_path, capsys, monkeypatch):
    path = tmp_path / "long.webp"
    levels = np.random.default_rng(0).integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
    write_video(path, [Image.fromarray(frame) for frame in levels], fps=8)
    for chunk in (64, 4):
        monkeypatch.setattr("hydra_hf.cli.reconstruct.CHUNK_FRAMES", chunk)
        assert run("reconstruct", path, "--num_frames", 17, "--out", tmp_path / f"{chunk}.gif", model=model) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "a cat", "--num_frames", 6, "--out", "x.mp4"), "num_frames=6 must be 1 + 4n"),
        (("generate", "a cat", "--num_frames", 5, "--out", "x.png"), "'.png' is not the ending of a clip"),
        (("ask", "missing.mp4", "what?"), "missing.mp4"),
        (("edit", "missing.png", "make it red", "--out", "x.png"), "missing.png"),
    ],
)
def test_what_cannot_be_done_is_one_line(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, model=model) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hydra")]
    assert message in line
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"


def test_a_damaged_clip_is_one_line(model, tmp_path, capsys):
    path = tmp_path / "damaged.mp4"
    path.write_bytes(b"\0" * 100)
    assert run("ask", path, "what?", model=model) == 2
    assert "damaged.mp4" in capsys.readouterr().err


def test_a_model_of_images_alone_says_that_it_reads_no_clips(tiny_pipeline, clip, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    assert run("ask", clip, "what?", model=str(tmp_path / "model")) == 2
    assert "reads images alone" in capsys.readouterr().err
