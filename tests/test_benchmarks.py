"""The measurements run and write what they print; how fast anything is, is not a test."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ["denoise_step", "image_sizes", "matmul_share", "memory", "text_answer", "tokenizer"]


def measure(name: str, monkeypatch, *arguments: str) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for module in ("common", "models"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    script.main(["--tiny", "--runs", "1", "--threads", str(torch.get_num_threads()), *arguments])


def test_every_script_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted([*SCRIPTS, "common", "models"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_a_table_and_writes_it(name, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    measure(name, monkeypatch, "--out", str(out))
    written = json.loads(out.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == written["title"]
    assert torch.__version__ in lines[1]
    assert f"cpus {written['facts']['cpus']}" in lines[1]
    assert len(lines) == 3 + len(written["rows"])
    for row in written["rows"]:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert list(tmp_path.iterdir()) == [out]


def test_a_step_of_the_measured_model_is_that_of_the_baseline(tmp_path, monkeypatch):
    measure("denoise_step", monkeypatch, "--out", str(tmp_path / "out.json"))
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["prompt tokens"] for row in rows] == [77, 256, 1100]
    assert all(0 < row["max difference"] < 1e-4 for row in rows)


def test_the_answer_is_the_same_with_and_without_a_cache(tmp_path, monkeypatch):
    measure("text_answer", monkeypatch, "--out", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["same answer"] is True
