import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hydra_hf.cli import create_parser, main
from hydra_hf.cli.common import load_pipeline
from hydra_hf.cli.recipe_options import recipe_function
from hydra_hf.cli.train import override, unused_data
from hydra_hf.data.sources import Source, Sources
from hydra_hf.evaluation.report import SuiteResult
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer
from hydra_hf.training.recipe import HydraLossWeights, HydraRecipe, HydraStage
from toy_models import toy_config, toy_pipeline, toy_video_pipeline


COMMANDS = ("generate", "ask", "chat", "reconstruct", "serve", "train", "evaluate")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a random pipeline."""
    folder = tmp_path_factory.mktemp("model")
    toy_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path) -> str:
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def error_of(capsys, *arguments: str) -> str:
    """The one line that a wrong call writes."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:  # of the parser
        code = error.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"hydra {arguments[0]}: ")
    assert len(captured.err.splitlines()) == 1
    return captured.err


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert f"example: hydra {command} " in capsys.readouterr().out


def test_a_call_without_a_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


# Drawing, asking, reconstructing


def test_generate_writes_the_picture_that_it_names(model, tmp_path, capsys):
    out = tmp_path / "new" / "cat.png"
    command = ["generate", "a cat", "--out", str(out), "--model", model, "--num_inference_steps", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out}: 64x64\n"
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(out), "width": 64, "height": 64, "seed": 0}
    with Image.open(out) as image:
        assert image.size == (64, 64)
    assert [path.name for path in out.parent.iterdir()] == ["cat.png"]


def test_progress_is_shown_on_a_terminal_alone(model, tmp_path, monkeypatch):
    for is_terminal in (True, False):
        stderr = io.StringIO()
        stderr.isatty = lambda is_terminal=is_terminal: is_terminal
        monkeypatch.setattr(sys, "stderr", stderr)
        words = ["generate", "a cat", "--out", str(tmp_path / "x.png"), "--model", model, "--num_inference_steps", "3"]
        assert main(words) == 0
        assert ("0/3" in stderr.getvalue()) is is_terminal


def test_one_seed_draws_one_picture(model, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert (
            main(["generate", "a cat", "--out", str(tmp_path / f"{name}.png"), "--model", model, "--seed", seed]) == 0
        )
    first, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == same
    assert first != other


def test_words_that_the_model_does_not_know_are_named_in_one_line(model, tmp_path, capsys):
    main(["generate", "a Zeppelin and a cat, please", "--model", model, "--out", str(tmp_path / "a.png")])
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "words" in line] == ["words that this model does not know: zeppelin"]
    main(["ask", str(tmp_path / "a.png"), "is there a cat?", "--model", model])
    assert "words" not in capsys.readouterr().err


def test_generate_draws_other_sizes(model, tmp_path):
    out = tmp_path / "wide.jpg"
    arguments = ["--height", "32", "--width", "80", "--num_inference_steps", "1"]
    assert main(["generate", "", "--out", str(out), "--model", model, *arguments]) == 0
    with Image.open(out) as image:
        assert (image.size, image.format) == ((80, 32), "JPEG")


def test_the_answer_is_the_last_line_of_stdout(model, picture, capsys):
    from hydra_hf.pipelines.answering import answer

    assert main(["ask", picture, "what is in the picture?", "--model", model]) == 0
    pipeline = toy_pipeline()
    expected = answer(pipeline.model, pipeline.processor, [Image.open(picture)], ["what is in the picture?"])[0]
    assert capsys.readouterr().out.rstrip("\n").endswith(expected)
    assert main(["ask", picture, "what is in the picture?", "--model", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"answer": expected}


SIXTEEN_BIT = Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64))


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("16bit.png", SIXTEEN_BIT),
        ("rgba.png", Image.new("RGBA", (20, 30), (255, 0, 0, 128))),
        ("one_pixel.png", Image.new("RGB", (1, 1), "red")),
        ("palette.gif", Image.new("RGB", (64, 64), "green").convert("P")),
        ("grey_alpha.png", Image.new("LA", (64, 64), (10, 200))),
        ("cmyk.jpg", Image.new("CMYK", (64, 64))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_of_any_mode_can_be_asked_about(model, tmp_path, capsys, name, image):
    image.save(tmp_path / name)
    assert main(["ask", str(tmp_path / name), "what is in the picture?", "--model", model]) == 0
    assert capsys.readouterr().out


def test_reconstruct_prints_how_near_the_copy_is(model, picture, tmp_path, capsys):
    out = tmp_path / "again.png"
    assert main(["reconstruct", picture, "--out", str(out), "--model", model]) == 0
    line = capsys.readouterr().out
    assert line.startswith("PSNR ")
    assert line.endswith(" dB at 64x64\n")
    assert float(line.split()[1]) > 0
    assert out.exists()
    assert main(["reconstruct", picture, "--out", str(out), "--model", model, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert f"{result.pop('psnr'):.2f}" == line.split()[1]
    assert result == {"path": str(out), "width": 64, "height": 64}


def test_a_photograph_is_read_upright(model, tmp_path):
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (0, 0, 64, 32))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    for name in ("turned", "upright"):
        main(["reconstruct", str(tmp_path / f"{name}.png"), "--out", str(tmp_path / f"{name}.bmp"), "--model", model])
    assert (tmp_path / "turned.bmp").read_bytes() == (tmp_path / "upright.bmp").read_bytes()


def test_evaluate_writes_every_score_and_how_it_was_measured(model, tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    sizes = ["--prompts_per_category", "1", "--prompts_per_kind", "1", "--prompts_per_size", "1", "--num_questions", "8",
             "--num_scenes", "2", "--seed", "3"]  # fmt: skip
    assert main(["evaluate", model, "--out", str(out), *sizes]) == 0
    result = SuiteResult.load(out)
    scores, printed = result.scores, json.loads(capsys.readouterr().out)
    assert printed == scores | {"difficulty": 1} | result.seeds | result.counts
    categories = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution", "mean")
    expected = {*(f"t2i/{name}" for name in categories), "vqa/mean", "vqa/majority", "reconstruction/psnr",
                "reconstruction/psnr_photos", "t2i_phrasing/plain", "t2i_phrasing/unknown_word", "t2i_size/64x64",
                "t2i_size/48x96"}  # fmt: skip
    assert expected <= set(scores)
    assert (result.suite, result.model, result.seeds, result.is_comparable) == ("toy", model, {"seed": 3}, False)
    assert result.counts == {"prompts_per_category": 1, "prompts_per_kind": 1, "prompts_per_size": 1, "num_questions": 8,
                             "num_scenes": 2}  # fmt: skip
    protocol = {
        "data": "toy world",
        "difficulty": 1,
        "split": "test",
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
    }
    assert protocol.items() <= result.protocol.items()
    assert len(result.protocol["weights"]) == 16


def test_evaluate_of_unimrg_has_painted_maps_next_to_trivial_ones(model, tmp_path):
    out = tmp_path / "scores.json"
    sizes = ["--prompts_per_category", "1", "--num_questions", "16", "--num_scenes", "2"]
    assert main(["evaluate", model, "--suite", "unimrg", "--out", str(out), *sizes]) == 0
    result = SuiteResult.load(out)
    scores = result.scores
    assert (result.suite, set(result.counts)) == ("unimrg", {"prompts_per_category", "num_questions", "num_scenes"})
    assert {"t2i/mean", "vqa/mean", "vqa/spatial"} <= set(scores)
    measures = ("psnr", "depth_similarity", "foreground_error", "foreground_iou", "boundary_f", "white_share", "order")
    kinds = ("paint", "paint_black", "paint_mean", "paint_another")
    assert {f"{kind}/{name}" for kind in kinds for name in measures} <= set(scores)


@pytest.fixture(scope="module")
def video_model(tmp_path_factory) -> str:
    """The folder of a random pipeline that reads and draws clips."""
    folder = tmp_path_factory.mktemp("video_model")
    toy_video_pipeline().save_pretrained(folder)
    return str(folder)


def test_evaluate_of_clips_has_answers_and_drawn_clips_next_to_trivial_ones(video_model, tmp_path):
    out = tmp_path / "scores.json"
    options = ["--suite", "video", "--num_questions", "3", "--num_captions", "2", "--out", str(out)]
    assert main(["evaluate", video_model, *options]) == 0
    result = SuiteResult.load(out)
    assert {"video_vqa/mean", "video_vqa/majority", "t2v/right", "t2v_frozen/objects"} <= set(result.scores)
    assert (result.suite, result.counts) == ("video", {"num_questions": 3, "num_captions": 2})


def test_evaluate_of_edits_has_every_kind(video_model, tmp_path):
    out = tmp_path / "scores.json"
    assert main(["evaluate", video_model, "--suite", "edit", "--edits_per_kind", "1", "--out", str(out)]) == 0
    kinds = ("recolor", "remove", "add", "replace", "move", "new_wording", "mean")
    assert {f"edit{unit}/{kind}" for unit in ("", "_psnr") for kind in kinds} <= set(SuiteResult.load(out).scores)
    assert SuiteResult.load(out).counts == {"edits_per_kind": 1}


# Errors


def test_clips_cannot_be_asked_of_a_model_of_images(model, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert "only reads images" in error_of(capsys, "evaluate", model, "--suite", "video", "--out", out)


def test_a_missing_picture_is_named(model, capsys):
    assert "nowhere.png" in error_of(capsys, "ask", "nowhere.png", "what?", "--model", model)


def test_a_text_file_is_no_picture(model, tmp_path, capsys):
    path = tmp_path / "text.png"
    path.write_text("not a picture")
    for command in (["ask", path, "what?"], ["reconstruct", path, "--out", tmp_path / "out.png"]):
        assert f"{path} is not an image" in error_of(capsys, *command, "--model", model)


def test_a_picture_cut_short_is_no_picture(model, tmp_path, capsys):
    path = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert f"{path} is not an image" in error_of(capsys, "ask", path, "what?", "--model", model)


def test_a_folder_is_no_picture(model, tmp_path, capsys):
    assert str(tmp_path) in error_of(capsys, "ask", tmp_path, "what?", "--model", model)


def test_an_empty_question_is_an_error(model, picture, capsys):
    assert "empty" in error_of(capsys, "ask", picture, " ", "--model", model)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--height", "30"], "multiple of the patch size 16"),
        (["--height", "0"], "height=0"),
        (["--num_inference_steps", "0"], "num_inference_steps=0"),
    ],
)
def test_an_option_that_cannot_be_drawn_is_an_error(model, tmp_path, capsys, arguments, expected):
    out = tmp_path / "cat.png"
    assert expected in error_of(capsys, "generate", "a cat", "--out", out, "--model", model, *arguments)
    assert not out.exists()


def test_an_ending_that_is_no_format_is_an_error(model, tmp_path, capsys):
    assert ".txt" in error_of(capsys, "generate", "a cat", "--out", tmp_path / "cat.txt", "--model", model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "nobody/nothing", "a b"])
def test_a_model_that_does_not_exist_is_an_error(picture, capsys, name):
    assert name in error_of(capsys, "ask", picture, "what?", "--model", name)


def test_a_folder_that_is_no_pipeline_is_an_error(picture, tmp_path, capsys):
    assert "model_index.json" in error_of(capsys, "ask", picture, "what?", "--model", tmp_path)


def test_weights_cut_short_are_an_error(model, picture, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(copy) in error_of(capsys, "ask", picture, "what?", "--model", copy)


def test_weights_that_do_not_fit_their_config_are_an_error(model, picture, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    config = json.loads((copy / "model" / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (copy / "model" / "config.json").write_text(json.dumps(config))
    assert main(["ask", picture, "what?", "--model", str(copy)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"hydra ask: The model {copy} cannot be loaded")


def test_a_config_that_is_no_json_is_an_error(model, picture, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "model" / "config.json").write_text("{")
    assert "config.json" in error_of(capsys, "ask", picture, "what?", "--model", copy)


@pytest.mark.parametrize("command", ["generate", "ask", "reconstruct", "evaluate"])
@pytest.mark.parametrize(
    ("part", "field", "value", "expected"),
    [
        ("text_config", "num_hidden_layers", "two", "expected int, got str (value: 'two')"),
        ("vision_config", "image_size", 63, "self.image_size=63 must be a multiple of self.patch_size=16"),
        ("vision_config", "patch_size", 0, "patch_size=0 must be at least 1"),
        ("vision_head_config", "num_attention_heads", 0, "num_attention_heads=0 must be at least 1"),
    ],
)
def test_a_config_value_that_cannot_be_is_an_error(
    model, picture, tmp_path, capsys, command, part, field, value, expected
):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    config = json.loads((copy / "model" / "config.json").read_text())
    config[part][field] = value
    (copy / "model" / "config.json").write_text(json.dumps(config))
    arguments = {
        "generate": ["a cat", "--out", tmp_path / "out.png", "--model", copy],
        "ask": [picture, "what?", "--model", copy],
        "reconstruct": [picture, "--out", tmp_path / "out.png", "--model", copy],
        "evaluate": [copy, "--out", tmp_path / "scores.json"],
    }[command]
    assert expected in error_of(capsys, command, *arguments)


@pytest.mark.parametrize(
    "name", ["prompts_per_category", "num_questions", "num_scenes", "num_captions", "edits_per_kind"]
)
def test_nothing_cannot_be_evaluated(model, tmp_path, capsys, name):
    assert f"--{name} 0" in error_of(capsys, "evaluate", model, "--out", tmp_path / "scores.json", f"--{name}", "0")


def test_an_unknown_difficulty_is_an_error(model, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert "difficulty=4" in error_of(capsys, "evaluate", model, "--out", out, "--difficulty", "4")


# Wrong options are one line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "a cat", "--out", "x.png", "--seed", str(2**70)], "is not a seed, expected an integer from 0"),
        (["generate", "a cat", "--out", "x.png", "--seed", "-1"], "--seed"),
        (["generate", "a cat", "--out", "x.png", "--height", "1e2"], "--height: got '1e2', expected an integer"),
        (["generate", "a cat", "--out", "x.png", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["generate", "a cat"], "--out"),
        (["evaluate", "--out", "x.json", "--seed", "x"], "'x' is not a seed"),
        (["draw", "a cat"], "invalid choice: 'draw'"),
        ([], "COMMAND"),
    ],
)
def test_an_option_that_cannot_be_parsed_is_one_line(capsys, arguments, expected):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("hydra")
    assert expected in captured.err


@pytest.mark.parametrize("scale", ["nan", "inf", "-1"])
def test_guidance_that_is_no_number_is_an_error(model, tmp_path, capsys, scale):
    out = tmp_path / "cat.png"
    message = error_of(capsys, "generate", "a cat", "--out", out, "--model", model, f"--guidance_scale={scale}")
    expected = {"-1": "guidance_scale=-1.0, expected a number from 0 to 1000"}
    assert expected.get(scale, f"--guidance_scale: got {scale!r}, expected a number") in message


def test_a_byte_that_is_not_utf8_is_an_error(model, picture, tmp_path, capsys):
    text = os.fsdecode(b"a cat \xff")  # as Python reads such an argument
    message = error_of(capsys, "generate", text, "--out", tmp_path / "cat.png", "--model", model)
    assert "prompt='a cat \\udcff', expected valid Unicode: character 6" in message
    assert "questions=" in error_of(capsys, "ask", picture, text, "--model", model)


def test_a_question_longer_than_the_context_is_an_error(model, picture, capsys):
    message = error_of(capsys, "ask", picture, "what " * 700, "--model", model)
    assert re.search(
        r"Question 0 takes \d{3,} tokens with its image, expected at most 480: the context has 512", message
    )


def test_a_picture_too_large_for_the_context_names_the_largest(model, tmp_path, capsys):
    sizes = ["--height", "1024", "--width", "1024"]
    message = error_of(capsys, "generate", "a cat", "--out", tmp_path / "cat.png", "--model", model, *sizes)
    side = int(re.search(r"largest square that fits is (\d+)x\1 pixels", message).group(1))
    sizes = ["--height", str(side), "--width", str(side), "--num_inference_steps", "1"]
    assert main(["generate", "", "--out", str(tmp_path / "cat.png"), "--model", model, *sizes]) == 0


@pytest.mark.parametrize("command", ["generate", "ask", "reconstruct", "evaluate", "train"])
@pytest.mark.parametrize("device", ["cuda:99", "vulkan", "nothing", ""])
def test_a_device_that_is_not_there_is_an_error(picture, tmp_path, capsys, command, device):
    arguments = {
        "generate": ["a cat", "--out", tmp_path / "x.png"],
        "ask": [picture, "what?"],
        "reconstruct": [picture, "--out", tmp_path / "x.png"],
        "evaluate": ["--out", tmp_path / "x.json"],
        "train": ["tiny.tokenizer", "--out", tmp_path / "run"],
    }[command]
    message = error_of(capsys, command, *arguments, "--device", device)
    assert f"Got --device {device}, expected one of auto, cpu" in message


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_take_the_type_that_is_asked_for(model, dtype):
    options = create_parser().parse_args(
        ["ask", "a.png", "what?", "--model", model, "--device", "cpu", "--dtype", dtype]
    )
    pipeline = load_pipeline(options)
    assert pipeline.model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert pipeline.device == torch.device("cpu")


def test_an_interrupt_is_one_line(model, tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(HydraPipeline, "from_pretrained", interrupted)
    assert main(["generate", "a cat", "--out", str(tmp_path / "cat.png"), "--model", model]) == 130
    assert capsys.readouterr().err == "hydra: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_sigterm_while_a_picture_is_written_leaves_nothing(model, tmp_path, monkeypatch):
    save = Image.Image.save

    def save_and_end(image, target, *options):
        save(image, target, *options)
        if isinstance(target, Path):
            assert target.stat().st_size
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Image.Image, "save", save_and_end)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "a cat", "--out", str(tmp_path / "cat.png"), "--model", model, "--num_inference_steps", "1"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**45), lambda: np.empty(2**50)], ids=["torch", "numpy"])
@pytest.mark.parametrize(
    "arguments, ways",
    [
        (["generate", "a cat", "--out", "cat.png"], "a lower --height and --width, --dtype bfloat16"),
        (["train", "tiny.hydra"], "a lower --micro_batch_size, --gradient_checkpointing, a lower --max_length"),
    ],
)
def test_too_little_memory_is_one_line_with_what_takes_less(capsys, monkeypatch, allocate, arguments, ways):
    monkeypatch.setattr(f"hydra_hf.cli.{arguments[0]}.run", lambda options: allocate())
    assert error_of(capsys, *arguments).endswith(f"out of memory; to use less, try: {ways}\n")


def test_another_error_of_the_machine_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("hydra_hf.cli.generate.run", lambda options: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(["generate", "a cat", "--out", "cat.png"])


# Where the result goes is looked at first


def result_options(command: str, picture: str) -> list[str]:
    return {"generate": ["a cat"], "reconstruct": [picture], "evaluate": []}[command]


@pytest.fixture
def no_model(monkeypatch):
    """A model is not even opened."""
    monkeypatch.setattr(HydraPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("the model was loaded"))


@pytest.mark.parametrize("command", ["generate", "reconstruct", "evaluate"])
def test_a_result_that_cannot_be_written_is_found_before_the_work(picture, tmp_path, capsys, no_model, command):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    before = sorted(tmp_path.rglob("*"))
    for name, expected in {
        "folder.png": "is a folder, expected a file",
        "file/x.png": "is not a folder",
        "pipe.png": "is not a regular file, expected a file",
        f"{'x' * 300}.png": "File name too long",
        f"{'x' * 251}.png": "File name too long",  # as the temporary file that takes this name at the end
        "/proc/x.png": "cannot be written",
    }.items():
        message = error_of(capsys, command, *result_options(command, picture), "--out", tmp_path / name)
        assert expected in message, name
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("ending", [".hdf", ".palm", ".xbm", ".nothing", ""])
def test_a_format_that_pillow_only_reads_is_found_before_the_work(tmp_path, capsys, no_model, ending):
    message = error_of(capsys, "generate", "a cat", "--out", tmp_path / f"x{ending}")
    assert f"{ending!r} is not an image format" in message


@pytest.mark.parametrize("command", [["train", "tiny.tokenizer"], ["convert", "--vision", "nobody/nothing"]])
def test_a_folder_that_cannot_be_made_is_found_before_the_work(tmp_path, capsys, command):
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/run"):
        message = error_of(capsys, *command, "--out", tmp_path / name)
        assert f"{tmp_path / name}" in message
        assert "expected a folder" in message or "is not a folder" in message


def test_scores_that_cannot_be_saved_are_printed(model, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hydra_hf.evaluation.report.write_text", full)
    sizes = ["--prompts_per_category", "1", "--prompts_per_kind", "0", "--prompts_per_size", "0", "--num_questions", "1",
             "--num_scenes", "1"]  # fmt: skip
    assert main(["evaluate", model, "--out", str(tmp_path / "scores.json"), *sizes]) == 2
    captured = capsys.readouterr()
    assert "t2i/mean" in json.loads(captured.out)
    assert "No space left on device" in captured.err


# Models that are wrong


def changed_copy(model: str, tmp_path, file: str, **values) -> str:
    """A copy of the model's folder, with other values in one of its JSON files."""
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    content = json.loads((copy / file).read_text())
    for name, value in values.items():
        *parts, last = name.split("__")
        place = content
        for part in parts:
            place = place[part]
        place[last] = value
    (copy / file).write_text(json.dumps(content))
    return str(copy)


@pytest.mark.parametrize(
    "values",
    [
        {"text_config__rope_parameters": {"rope_type": "nothing", "rope_theta": 1.0}},
        {"text_config__num_attention_heads": 0},
        {"dtype": "float31"},
        {"text_config__model_type": 7},
    ],
    ids=str,
)
def test_a_config_that_no_library_reads_is_one_line(model, picture, tmp_path, capsys, values):
    copy = changed_copy(model, tmp_path, "model/config.json", **values)
    assert main(["ask", picture, "what?", "--model", copy]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"hydra ask: The model {copy} cannot be loaded: ")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"_class_name": "Nothing"}', "\0"])
def test_an_index_that_is_none_is_one_line(model, picture, tmp_path, capsys, content):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "model_index.json").write_text(content)
    assert main(["ask", picture, "what?", "--model", str(copy)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"hydra ask: The model {copy} cannot be loaded: ")


def test_weights_of_nan_are_an_error(model, picture, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    weights = load_file(copy / "model" / "model.safetensors")
    weights["model.language_model.norm.weight"].fill_(float("nan"))
    save_file(weights, copy / "model" / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "x.png"
    for command in (["generate", "a cat", "--out", str(out)], ["ask", picture, "what?"]):
        assert main([*command, "--model", str(copy)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "not finite" in captured.err.splitlines()[-1]
    assert not out.exists()


def test_a_processor_of_another_vocabulary_is_an_error(model, picture, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    other = train_toy_tokenizer(["hello"], vocab_size=300)
    other.save_pretrained(copy / "processor")
    message = error_of(capsys, "ask", picture, "what?", "--model", copy)
    assert "The processor does not belong to the model: its " in message


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a b"])
def test_a_folder_that_is_not_there_is_named_as_one(picture, capsys, name):
    message = error_of(capsys, "ask", picture, "what?", "--model", name)
    assert f"There is no folder {name!r}; a Hub id is owner/name" in message


def test_a_file_is_no_model(picture, capsys):
    message = error_of(capsys, "ask", picture, "what?", "--model", picture)
    assert f"{picture!r} is a file, expected a folder or a Hub id" in message


# Training


@pytest.mark.parametrize("name", ["tiny", "tiny.nothing", "nothing.tokenizer", "tiny.replace", "tiny.ATTENTION", ""])
def test_a_recipe_that_does_not_exist_is_an_error(capsys, tmp_path, name):
    assert repr(name) in error_of(capsys, "train", name, "--out", tmp_path)


def test_a_recipe_that_trains_the_tokenizer_takes_none(capsys, tmp_path):
    assert "unexpected '--tokenizer'" in error_of(
        capsys, "train", "tiny.tokenizer", "--tokenizer", "x", "--out", tmp_path
    )


def test_a_recipe_on_a_tokenizer_that_is_not_there_is_an_error(capsys, tmp_path):
    missing = tmp_path / "nowhere"
    message = error_of(capsys, "train", "tiny.hydra", "--tokenizer", missing, "--out", tmp_path / "run")
    assert str(missing) in message


def test_a_recipe_on_a_tokenizer_says_what_to_train_first(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(capsys, "train", "tiny.hydra", "--out", tmp_path / "run")
    assert "no folder runs/tiny.tokenizer/decoder/final: run `hydra train tiny.tokenizer` first" in message


@pytest.mark.parametrize("arguments", [["tiny.hydra", "--tokenizer"], ["hydra.hydra_1_5b", "--init"]])
def test_a_first_model_that_is_not_there_is_named(capsys, tmp_path, arguments):
    message = error_of(capsys, "train", *arguments, "/no/such/model", "--out", tmp_path / "run")
    assert "There is no folder '/no/such/model'; a Hub id is owner/name" in message


def test_a_run_without_steps_is_an_error(capsys, tmp_path):
    assert "num_steps=0" in error_of(capsys, "train", "tiny.tokenizer", "--num_steps", "0", "--out", tmp_path)


@pytest.mark.slow
def test_a_recipe_at_full_size_says_what_it_needs(capsys, tmp_path):
    assert "needs --init" in error_of(capsys, "train", "hydra_tok.internvit_300m", "--out", tmp_path)


def test_an_option_that_a_recipe_does_not_take_is_refused(capsys, tmp_path):
    message = error_of(capsys, "train", "tiny.hydra", "--techer", "vit", "--out", tmp_path)
    assert "unexpected '--techer'" in message


def test_a_source_that_is_not_one_is_refused(capsys, tmp_path):
    message = error_of(capsys, "train", "tiny.tokenizer", "--data", "images", "--out", tmp_path)
    assert "'images' is not TASK=PATH" in message


def test_options_of_train_are_fields_of_the_recipe_and_of_its_stages(tmp_path):
    recipe = HydraRecipe(
        name="test", config=toy_config(), stages=(HydraStage(name="stage1", num_steps=9, learning_rates={}, tasks={}),),
        tokenizer=None, processor=None,
    )  # fmt: skip
    words = ["--save_every", "7", "--max_length", "64", "--num_workers", "2", "--num_steps", "3", "--micro_batch_tokens", "640",
             "--held_out", "generate=images", "--gradient_checkpointing", "--sample_prompts", "a cat", "two dogs", "--tasks",
             "generate=4", "--loss_weights", "flow=0.5"]  # fmt: skip
    options = create_parser().parse_args(["train", "tiny.hydra", *words])
    changed = override(recipe, options, recipe_function("tiny.hydra"))
    assert (changed.save_every, changed.max_length, changed.num_workers, changed.micro_batch_tokens) == (7, 64, 2, 640)
    assert changed.gradient_checkpointing is True
    assert changed.sample_prompts == ("a cat", "two dogs")
    (stage,) = changed.stages
    assert stage.num_steps == 3
    assert stage.tasks == {"generate": 4}
    assert stage.loss_weights == HydraLossWeights(language=1.0, flow=0.5)
    assert stage.held_out == Sources((Source(task="generate", path="images"),))
    assert (changed.seed, stage.drop_prompt) == (recipe.seed, recipe.stages[0].drop_prompt)


@pytest.mark.parametrize(
    ("tasks", "unused"),
    [([], ["interleave=dialogues.jsonl"]), (["--tasks", "generate=4", "interleave=2"], ["text=chat.jsonl"])],
)
def test_data_that_no_stage_trains_on_is_named(tasks, unused):
    words = ["--data", "generate=images", "--data", "interleave=dialogues.jsonl", "--data", "text=chat.jsonl"]
    options = create_parser().parse_args(["train", "hydra.hydra_1_5b", *words, *tasks])
    make = recipe_function("hydra.hydra_1_5b")
    recipe = make()
    if tasks:  # those of the paper weigh tasks that are not trained here
        recipe = replace(recipe, stages=recipe.stages[:2])
    assert unused_data(override(recipe, options, make)) == unused


def test_a_run_that_never_saves_is_refused(tmp_path, capsys):
    arguments = ["train", "tiny.tokenizer", "--save_every", "0", "--out", tmp_path / "run"]
    assert "self.save_every=0" in error_of(capsys, *arguments)


@pytest.mark.slow  # three runs of the command line
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A limit on the size of files in the place of a full disk."""
    command = [sys.executable, "-m", "hydra_hf.cli", "train", "tiny.tokenizer", "--stage", "foundation", "--num_steps", "2",
               "--save_every", "1", "--out"]  # fmt: skip

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    full = subprocess.run([*command, str(tmp_path / "full")], preexec_fn=limit, capture_output=True, text=True)
    assert full.returncode == 2
    assert "checkpoint-1 cannot be written: " in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "full").rglob("*.safetensors"))
    for folder in ("full", "whole"):
        subprocess.run([*command, str(tmp_path / folder)], check=True, capture_output=True)
    weights = [(tmp_path / folder / "foundation/final/model.safetensors").read_bytes() for folder in ("full", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow  # two runs of the command line
def test_a_folder_of_another_run_is_one_line_that_names_the_field(tmp_path, capsys):
    command = [sys.executable, "-m", "hydra_hf.cli", "train", "tiny.tokenizer", "--stage", "foundation", "--out",
               str(tmp_path), "--num_steps"]  # fmt: skip
    subprocess.run([*command, "1"], check=True, capture_output=True)
    other = subprocess.run([*command, "3"], capture_output=True, text=True)
    assert other.returncode == 2
    assert "was made with foundation.num_steps=1, but this run has 3" in other.stderr.splitlines()[-1]


@pytest.mark.slow
def test_train_runs_every_stage_of_a_recipe_and_resumes_where_it_was(tmp_path):
    def train() -> list[str]:
        """In a process of its own: accelerate keeps one precision for each."""
        arguments = ["train", "tiny.tokenizer", "--num_steps", "2", "--out", str(tmp_path / "run")]
        command = [sys.executable, "-m", "hydra_hf.cli", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()

    final = tmp_path / "run" / "decoder" / "final"
    assert train() == [
        *(f"tiny.tokenizer: stage {name}, 2 steps" for name in ("foundation", "semantics", "decoder")),
        str(final),
    ]
    weights = (final / "model.safetensors").read_bytes()
    shutil.rmtree(final)
    assert train() == ["tiny.tokenizer: stage decoder, 2 steps", str(final)]
    assert (final / "model.safetensors").read_bytes() == weights
