"""Records of the tasks that paint what they are given: the same part of image and target, and what is missing."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_hf.data.painting import boundary_pixels, depth_pixels, path_below, shows_the_same, without_target
from hydra_hf.data.prompts import PROMPTS
from hydra_hf.data.readers import TaskReader
from hydra_hf.data.sources import Source, Sources, parse_source
from hydra_hf.data.tasks import TASKS
from hydra_hf.modeling import HydraImageProcessor


pytestmark = pytest.mark.usefixtures("cache")

SQUARE = HydraImageProcessor(size={"height": 32, "width": 32}, patch_size=8)


def coordinates(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a pixel says where it was."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8))


def png(image: Image.Image, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path) -> Path:
    """Five images in folders, LLaVA's JSON of them with a text of its own, and their targets: depth grows to the right."""
    records = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]
    for number in range(5):
        path, width, height = f"coco/part{number % 2}/{number:03d}", (96, 60)[number % 2], 64
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"number {number}"}]
        records.append({"id": str(number), "image": f"{path}.jpg", "conversations": turns})
        for folder, ending in (("images", "jpg"), ("targets/depth", "png"), ("targets/segment", "png")):
            file = tmp_path / folder / f"{path}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = coordinates(width, height)
            (image if folder == "images" else image.getchannel("R").convert("RGB")).save(file, quality=95)
    (tmp_path / "llava.json").write_text(json.dumps(records))
    return tmp_path


def source_of(data: Path, task: str = "depth", **kwargs) -> Source:
    targets = None if task == "reconstruct" else str(data / "targets" / task)
    return Source(
        **{"task": task, "path": f"{data}/llava.json", "image_root": f"{data}/images", "targets": targets} | kwargs
    )


@pytest.fixture
def reader_of(tiny_processor):
    """A function that opens a source for a processor that keeps aspects."""
    tiny_processor.image_processor.size = {"min_pixels": 64, "max_pixels": 32 * 32}

    def reader_of(source: Source, seed: int = 0, max_length: int = 200) -> TaskReader:
        return TaskReader((source,), tiny_processor, seed, max_length=max_length)

    return reader_of


def parts_of(sample) -> tuple[torch.Tensor, str, torch.Tensor]:
    (user, assistant) = sample.messages
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    assert [part["type"] for part in user["content"]] == list(TASKS[sample.task].user)
    return user["content"][1]["image"], user["content"][0]["text"], assistant["content"][0]["image"]


# What a sample is


@pytest.mark.parametrize("task", ["reconstruct", "depth", "segment"])
def test_the_target_lies_under_the_image_pixel_for_pixel(data, reader_of, task):
    reader = reader_of(source_of(data, task))
    shapes = set()
    for number in range(8):
        image, prompt, target = parts_of(reader[number])
        assert prompt in PROMPTS[task]
        assert image.shape == target.shape
        assert image.abs().max() <= 1
        red = image[0]
        if task == "depth":  # the range of this part
            red = (red - red.min()) / (red.max() - red.min()) * 2 - 1
        step = 2 / image.shape[-1]  # of a pixel to its neighbour
        assert (target[0] - red).abs().max() < 1.5 * step
        shapes.add(tuple(image.shape[1:]))
    assert len(shapes) == 2  # each in the aspect that is nearest to its own


def test_a_target_of_another_scale_is_read_as_the_image_is(data, reader_of):
    for file in (data / "targets" / "depth").rglob("*.png"):
        target = Image.open(file)
        target.resize((target.width * 3, target.height * 3)).save(file)
    image, _, target = parts_of(reader_of(source_of(data))[0])
    assert image.shape == target.shape
    assert np.corrcoef(image[0].flatten(), target[0].flatten())[0, 1] > 0.999


def test_the_source_is_as_wide_as_the_command_line_says(data, reader_of):
    text = f"depth={data}/llava.json,image_root={data}/images,targets={data}/targets/depth,condition_image_size=16"
    source = parse_source(text)
    assert source == source_of(data, condition_image_size=16)
    image, _, target = parts_of(reader_of(source)[0])
    assert image.shape[1] * image.shape[2] <= 16 * 16 < target.shape[1] * target.shape[2]
    assert image[0, :, 0].mean() == pytest.approx(float(target[0, :, :2].mean()), abs=0.2)  # the same part is in both


def test_a_photograph_that_lies_on_its_side_is_turned_before_it_meets_its_target(data, reader_of):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    for file in (data / "images").rglob("*.jpg"):
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file, quality=95, exif=exif)
    image, _, target = parts_of(reader_of(source_of(data))[0])
    assert np.corrcoef(image[0].flatten(), target[0].flatten())[0, 1] > 0.99


def test_depth_is_stretched_over_the_part_that_is_seen():
    depth = depth_pixels(coordinates(128, 32).getchannel("R").convert("RGB"), 32, 32, SQUARE)
    assert depth.shape == (3, 32, 32)
    assert depth.aminmax() == (-1, 1)  # the middle quarter has levels 96 to 159 alone
    assert torch.equal(depth[0], depth[2])
    assert depth[0, 0].diff().min() >= 0


def test_what_is_equally_far_everywhere_is_black():
    assert (depth_pixels(Image.new("RGB", (40, 40), (120, 120, 120)), 32, 32, SQUARE) == -1).all()


def test_sixteen_bit_depth_keeps_its_range():
    ramp = Image.fromarray(np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16))
    assert depth_pixels(ramp, 32, 32, SQUARE).aminmax() == (-1, 1)


@pytest.mark.parametrize("side", [32, 45, 128, 500])
def test_a_line_of_one_pixel_stays_whole_and_white_at_any_smaller_size(side):
    lines = np.zeros((side, side), np.uint8)
    lines[np.arange(side), np.arange(side)] = 255
    lines[side // 3] = 255
    painted = boundary_pixels(Image.fromarray(lines).convert("RGB"), 32, 32, SQUARE)
    assert set(painted.unique().tolist()) == {-1.0, 1.0}
    assert (painted[0].diagonal() == 1).all()
    assert (painted[0] == 1).all(dim=1).any()
    assert (painted[0] == 1).float().mean() < 0.2


def test_enlarged_lines_stay_black_and_white():
    lines = np.zeros((20, 20), np.uint8)
    lines[5] = 255
    painted = boundary_pixels(Image.fromarray(lines), 32, 32, SQUARE)
    assert set(painted.unique().tolist()) == {-1.0, 1.0}
    assert 0 < (painted[0] == 1).all(dim=1).sum() <= 2


# Prompts


def test_prompts_are_the_same_for_every_asker_and_other_ones_in_the_next_epoch(data, reader_of):
    source = source_of(data)
    prompts = [parts_of(reader_of(source)[number])[1] for number in range(24)]
    again = reader_of(source)
    assert [parts_of(again[number])[1] for number in reversed(range(24))] == prompts[::-1]
    assert len(set(prompts)) > 5
    assert [parts_of(reader_of(source, seed=1)[number])[1] for number in range(24)] != prompts


def test_prompts_of_a_file_are_taken(data, reader_of):
    (data / "prompts.txt").write_text("far or near?\n\n  how deep? \n")
    reader = reader_of(source_of(data, prompts=str(data / "prompts.txt")))
    assert {parts_of(reader[number])[1] for number in range(12)} == {"far or near?", "how deep?"}


@pytest.mark.parametrize("content", [None, b"\n \n", b"\xff\xfe\xff"])
def test_a_file_without_prompts_is_refused(data, reader_of, content):
    if content is not None:
        (data / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.txt|prompts in"):
        reader_of(source_of(data, prompts=str(data / "prompts.txt")))


# What is missing or wrong


def test_missing_targets_are_named_before_the_first_step(data, reader_of):
    (data / "targets/depth/coco/part1/001.png").unlink()
    (data / "targets/depth/coco/part0/004.png").unlink()
    with pytest.raises(
        ValueError, match=r"2 images have no target in .*depth, such as coco/part1/001.jpg, coco/part0/004"
    ):
        reader_of(source_of(data))
    reader_of(source_of(data, "segment"))  # these are all there
    with pytest.raises(ValueError, match="there is no folder targets="):
        reader_of(source_of(data, targets=str(data / "nowhere")))


def test_training_does_not_begin_without_a_target(data, tiny_processor):
    from hydra_hf.training.recipe import HydraStage

    (data / "targets/depth/coco/part1/001.png").unlink()
    stage = HydraStage(name="one", num_steps=900, learning_rates={"lm_head": 1e-3}, tasks={"depth": 2})
    with pytest.raises(ValueError, match="1 images have no target"):
        Sources((source_of(data),)).bundles(stage, tiny_processor, 0, max_length=200)


def test_what_preparation_could_not_make_is_skipped_and_counted(data, reader_of):
    (data / "images/coco/part1/001.jpg").write_bytes(b"no picture")
    (data / "targets/depth/coco/part1/001.png").unlink()
    manifest = {"depth": {"failures": {"coco/part1/001.jpg": "cannot be read"}}}
    (data / "targets/manifest.json").write_text(json.dumps(manifest))
    reader = reader_of(source_of(data))
    assert all(reader[number] is not None for number in range(12))
    reasons = {reason.rpartition(": ")[2] for reason in reader.num_skipped}
    assert reasons == {"an image that cannot be decoded", "no image"}  # the latter is the text without one


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[: len(content) // 2], "a target that cannot be decoded"),
        (lambda content: b"", "a target that cannot be decoded"),
        (lambda content: png(coordinates(64, 96)), "a target of another aspect than its image"),
    ],
)
def test_a_target_that_is_wrong_is_skipped_and_counted(data, reader_of, damage, reason):
    file = data / "targets/depth/coco/part0/002.png"
    file.write_bytes(damage(file.read_bytes()))
    reader = reader_of(source_of(data))
    assert all(reader[number] is not None for number in range(12))
    assert any(key.endswith(f": {reason}") for key in reader.num_skipped)


def test_a_target_that_vanishes_during_the_run_is_skipped_and_counted(data, reader_of):
    reader = reader_of(source_of(data))
    (data / "targets/depth/coco/part0/002.png").unlink()
    assert all(reader[number] is not None for number in range(12))
    assert any("a target that is not there" in reason for reason in reader.num_skipped)


def test_an_empty_answer_is_skipped_and_counted(data, reader_of):
    records = json.loads((data / "llava.json").read_text())
    records[2]["conversations"][1]["value"] = " "
    (data / "llava.json").write_text(json.dumps(records))
    reader = reader_of(source_of(data, "understand", targets=None))
    assert all(reader[number] is not None for number in range(12))
    assert any("an empty turn" in reason for reason in reader.num_skipped)
    painting = reader_of(source_of(data))
    assert all(len(parts_of(painting[number])) == 3 for number in range(12))
    assert not any("an empty turn" in reason for reason in painting.num_skipped)  # the image can be painted anyway


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "understand"}, r"targets is for the tasks \['reconstruct', 'depth', 'segment'\]"),
        ({"task": "reconstruct"}, "what 'reconstruct' paints is the image itself"),
        ({"task": "generate", "targets": None, "prompts": "p.txt"}, "prompts is for the tasks"),
        ({"path": "hub:someone/data"}, "on the Hub, targets are a column 'depth'"),
        ({"condition_image_size": 0}, "condition_image_size=0 must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_for_a_source_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Source(**{"task": "depth", "path": "a.json", "targets": "t"} | settings)


def test_a_condition_smaller_than_a_patch_is_refused(data, reader_of):
    with pytest.raises(ValueError, match="condition_image_size=4 must be at least patch_size=8"):
        reader_of(source_of(data, condition_image_size=4))
    with pytest.raises(ValueError, match="expected a number"):
        parse_source("depth=a.json,targets=t,condition_image_size=small")


# Other forms of data


def test_a_folder_of_images_has_its_targets_by_their_paths(data, reader_of):
    reader = reader_of(source_of(data, path=f"{data}/images", image_root=None))
    assert parts_of(reader[0])[2].aminmax() == (-1, 1)


def test_records_that_hold_their_images_hold_their_targets(files, reader_of):
    image, depth = png(coordinates(40, 40)), png(coordinates(40, 40).getchannel("R"))
    files.tar([{"png": image, "depth.png": depth}, {"png": image}])
    reader = reader_of(Source(task="depth", path=f"{files.folder}/000.tar"))
    for number in range(4):
        image, _, target = parts_of(reader[number])
        assert np.corrcoef(image[0].flatten(), target[0].flatten())[0, 1] > 0.99
    assert any(reason.endswith("no target") for reason in reader.num_skipped)
    parquet = files.parquet(range(3), depth=[{"bytes": depth, "path": None}] * 3)
    with pytest.raises(ValueError, match="none of"):  # 16x16 against 40x40 is one aspect; these have none
        reader_of(Source(task="depth", path=str(files.parquet(range(3), "b.parquet", depth=[None] * 3))))[0]
    assert parts_of(reader_of(Source(task="depth", path=str(parquet)))[0])[2].aminmax() == (-1, 1)


def test_records_without_any_target_are_refused(data, files, reader_of):
    with pytest.raises(
        ValueError, match="expected one of .'depth', 'depth.png', 'depth.jpg'. with what is painted, or targets"
    ):
        reader_of(source_of(data, targets=None))
    files.tar([{"png": files.png(1)}])
    with pytest.raises(ValueError, match="record 0 has no path of an image below"):
        reader_of(source_of(data, path=f"{files.folder}/000.tar", image_root=None))


def test_a_reconstruction_needs_nothing_but_images(files, reader_of, number_in):
    files.folder_of(range(4))
    reader = reader_of(Source(task="reconstruct", path=f"{files.folder}/pictures"))
    for number in range(4):
        image, _, target = parts_of(reader[number])
        assert torch.equal(image, target)
    assert {number_in(parts_of(reader[number])[2]) for number in range(4)} == {0, 1, 2, 3}


# Parts


def test_a_path_is_one_below_the_folder_of_images(tmp_path):
    assert path_below("a/./b.jpg", tmp_path) == "a/b.jpg"
    assert path_below(str(tmp_path / "a.jpg"), tmp_path) == "a.jpg"
    assert path_below({"path": "a.jpg", "bytes": None}, tmp_path) == "a.jpg"
    for value in (
        "../a.jpg",
        "/elsewhere/a.jpg",
        b"bytes",
        {"bytes": b"x", "path": "a.jpg"},
        None,
        "zip://a.jpg::b.zip",
    ):
        assert path_below(value, tmp_path) is None


def test_a_target_has_the_name_of_its_image_or_its_stem(tmp_path):
    for name in ("a/1.jpg", "a/2.png", "3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = ["a/1.jpg", "a/2.webp", "3.png", "a/4.jpg", "b/1.jpg", "a/4.jpg"]
    assert without_target(iter(paths), tmp_path) == ["a/4.jpg", "b/1.jpg"]


def test_a_rounded_size_is_the_same_aspect():
    for width, height, scale in [(640, 427, 0.3), (427, 640, 0.7), (1023, 33, 0.2), (31, 29, 1.9)]:
        image, target = Image.new("L", (width, height)), Image.new("L", (round(width * scale), round(height * scale)))
        assert shows_the_same(image, target)
    assert not shows_the_same(Image.new("L", (64, 48)), Image.new("L", (48, 64)))
    assert not shows_the_same(Image.new("L", (640, 480)), Image.new("L", (512, 512)))


def test_another_file_of_prompts_is_other_data(data):
    from hydra_hf.data.fingerprint import difference, fingerprint

    (data / "prompts.txt").write_text("how deep?")
    source = source_of(data, prompts=str(data / "prompts.txt"))
    saved = fingerprint(source)
    assert difference([saved], [fingerprint(source)]) == ""
    (data / "moved.txt").write_text("how deep?")
    assert difference([saved], [fingerprint(replace(source, prompts=str(data / "moved.txt")))]) == ""
    (data / "prompts.txt").write_text("how far?")
    assert "prompts" in difference([saved], [fingerprint(source)])
    assert "condition_image_size=16" in difference([saved], [fingerprint(replace(source, condition_image_size=16))])
