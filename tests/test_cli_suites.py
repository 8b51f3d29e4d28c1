"""hydra evaluate with a benchmark, and hydra report."""

import json

import pytest

from hydra_hf.cli import main
from toy_models import toy_pipeline


ROW = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a random pipeline."""
    folder = tmp_path_factory.mktemp("model")
    toy_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    return str(tmp_path / "rows.jsonl")


def test_a_benchmark_is_drawn_and_reported(model, data, tmp_path, capsys):
    (tmp_path / "verdicts.jsonl").write_text(json.dumps({"tag": "single_object", "correct": True}))
    options = ["--num_images", "1", "--num_inference_steps", "1", "--folder", str(tmp_path / "images"), "--seed", "5"]
    options += ["--official_results", str(tmp_path / "verdicts.jsonl"), "--out", str(tmp_path / "geneval.json")]
    assert main(["evaluate", model, "--suite", "geneval", "--data", data, *options]) == 0
    assert "geneval/overall" in capsys.readouterr().out
    assert (tmp_path / "images" / "00000" / "samples" / "0000.png").is_file()
    assert main(["report", str(tmp_path / "geneval.json"), "--out", str(tmp_path / "report.md")]) == 0
    text = (tmp_path / "report.md").read_text()
    assert f"| **{model}** |  |  | 1.00* |" in text  # one prompt is not comparable
    assert "| HYDRA 7B | 0.97 | 0.81 | 0.86 |" in text
    assert "seed 5" in text


def test_the_toy_world_is_reported_apart_from_the_papers(model, tmp_path, capsys):
    out = str(tmp_path / "toy.json")
    sizes = [
        "--prompts_per_category",
        "1",
        "--prompts_per_kind",
        "0",
        "--prompts_per_size",
        "0",
        "--num_questions",
        "1",
    ]
    assert main(["evaluate", model, "--out", out, *sizes, "--num_scenes", "1"]) == 0
    capsys.readouterr()
    assert main(["report", out]) == 0
    (head, *_) = text = capsys.readouterr().out.splitlines()
    assert head == "### Toy world: suite toy"
    assert f"| score | {model} |" in text
    assert not [line for line in text if "HYDRA" in line]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--suite", "geneval", "--folder", "x"], "--suite geneval needs --data"),
        (["--suite", "geneval", "--data", "nowhere", "--folder", "x"], "--data nowhere does not exist"),
        (["--suite", "geneval", "--tasks", "mme"], "--tasks does not go with --suite geneval"),
        (["--suite", "geneval", "--data", ".", "--folder", "x", "--limit", "0"], "at least 1"),
        (["--limit", "3"], "--limit does not go with --suite toy"),
    ],
)
def test_wrong_options_are_said_before_the_model_is_loaded(options, expected, tmp_path, capsys):
    assert main(["evaluate", "no_model", "--out", str(tmp_path / "x.json"), *options]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["lmms_eval", "vlmevalkit"])
def test_a_missing_extra_is_named(suite, model, tmp_path, capsys, monkeypatch):
    for name in ("lmms_eval", "vlmeval"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    out = ["--out", str(tmp_path / "x.json"), "--folder", str(tmp_path / "x")]
    assert main(["evaluate", model, "--suite", suite, "--tasks", "mme", *out]) == 2
    assert f"pip install hydra_hf[{suite}]" in capsys.readouterr().err


def test_a_report_of_another_file_is_an_error(data, capsys):
    assert main(["report", data]) == 2
    assert "has the format None" in capsys.readouterr().err
