"""The measurements run and write what they print; how fast anything is, is not a test."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [
    "clips",
    "data",
    "denoise_step",
    "image_sizes",
    "matmul_share",
    "memory",
    "packing",
    "serving",
    "text_answer",
    "tokenizer",
    "training_memory",
]


def load(name: str, monkeypatch):
    """A script as a module; what it imports from its own folder is forgotten again."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for module in ("common", "models", *SCRIPTS):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return script


def measure(name: str, monkeypatch, *arguments: str) -> None:
    script = load(name, monkeypatch)
    script.main(["--tiny", "--runs", "1", "--threads", str(torch.get_num_threads()), *arguments])


def test_every_script_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted([*SCRIPTS, "common", "gpu", "models"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow) if each == "clips" else each for each in SCRIPTS]
)
def test_a_script_prints_a_table_and_writes_it(name, tmp_path, monkeypatch, capsys):
    if name == "serving":
        for package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
            pytest.importorskip(package)
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


# The script for a GPU


OPTIONS = SimpleNamespace(device="cpu", tiny=True, backend="aot_eager", prompt=77, runs=1, dtype="fp32")


@pytest.fixture
def gpu(monkeypatch):
    return load("gpu", monkeypatch)


def test_all_sections_together_stay_under_eight_minutes(gpu):
    assert sum(limit for _, limit in gpu.SECTIONS.values()) < 8 * 60


@pytest.mark.parametrize(
    "name",
    [
        "agreement fp32",
        "agreement bf16",
        pytest.param("flex attention", marks=pytest.mark.slow),
        "denoise_step",
        "tokenizer",
    ],
)
def test_a_section_gives_rows_that_pass(gpu, name):
    rows = gpu.SECTIONS[name][0](OPTIONS)
    assert rows
    for row in rows:
        assert set(row) == {"measure", "value", "bar", "passes"}
        assert math.isfinite(row["value"])
        assert row["passes"] in (True, "")


def test_an_error_of_the_second_device_is_seen(gpu, monkeypatch):
    monkeypatch.setattr(
        gpu, "outputs", lambda model, device: {"logits": torch.ones(2) * (2 if device == "other" else 1)}
    )
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *args: module)
    rows = gpu.agreement(SimpleNamespace(device="other"), "fp32")
    assert [(row["value"], row["passes"]) for row in rows] == [(1.0, False)]


@pytest.mark.parametrize(
    "options, limit, message",
    [({"device": "nowhere"}, 60, "RuntimeError: Expected one of cpu, cuda"), ({}, 0.5, "stopped after 0.5 s")],
)
def test_a_section_that_fails_is_a_row(gpu, options, limit, message):
    (row,) = gpu.run("agreement fp32", SimpleNamespace(**{**vars(OPTIONS), **options}), limit)
    assert (row["section"], row["passes"]) == ("agreement fp32", False)
    assert row["measure"].startswith(message)


def test_a_section_whose_process_ends_is_a_row(gpu, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    (row,) = gpu.run("agreement fp32", OPTIONS, limit=20)
    assert (row["measure"], row["passes"]) == ("the process ended with code 1", False)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--quick", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads(out.read_text())
    assert written["failed"] == []
    assert len({row["section"] for row in written["rows"]}) == 9
    assert len(result.stdout.splitlines()) == 1 + len(written["rows"])


@pytest.mark.gpu
def test_every_section_passes_on_the_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    device = torch.accelerator.current_accelerator().type
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", device, "--out", str(out)]
    subprocess.run(command, capture_output=True, text=True, timeout=600)
    rows = json.loads(out.read_text())["rows"]
    agreement = [
        row for row in rows if row["section"] in ("agreement fp32", "agreement bf16", "compile", "flex attention")
    ]
    assert [row for row in agreement if not row["passes"]] == []
