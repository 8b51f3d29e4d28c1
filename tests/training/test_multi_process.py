"""Two processes on one machine, as torchrun and `accelerate launch` start them; and the same run on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra_run
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file


TESTS = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
SECONDS = 900  # a deadlock ends the test


def start(*command: str) -> str:
    """Output of a command that sees the test's modules; what it wrote is the message if it fails."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "training"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def log_of(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "stage1" / "log.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [
        {name: value for name, value in record.items() if name in names or "/" in name}
        for record in records
        if "loss" in record
    ]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "stage1" / "checkpoint-3" / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With every run of `hydra_run`, on one process and on two."""
    folder = tmp_path_factory.mktemp("runs")
    for name in hydra_run.RUNS:
        hydra_run.run(folder, name, folder / f"{name}-one")
    start(*TORCHRUN, TESTS / "training" / "hydra_run.py", folder, *hydra_run.RUNS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", hydra_run.RUNS)
def test_a_run_on_two_processes_is_the_run_on_one(folder, name):
    one, many = folder / f"{name}-one", folder / f"{name}-many"
    torch.testing.assert_close(weights_of(many), weights_of(one), rtol=1e-5, atol=1e-5)
    assert [record["step"] for record in log_of(many)] == [1, 2, 3]  # written once
    for record, expected in zip(log_of(many), log_of(one), strict=True):
        assert record == pytest.approx(expected, rel=1e-4, abs=2e-5)  # the log has five digits


@pytest.mark.slow
def test_the_images_that_processes_share_are_those_of_one(folder):
    one, many = (Image.open(folder / f"even-{name}" / "stage1" / "samples-000003.png") for name in ("one", "many"))
    assert len({one.crop((x, 0, x + 64, 64)).tobytes() for x in (2, 68, 134)}) == 3
    assert np.abs(np.asarray(one, np.int16) - np.asarray(many, np.int16)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", hydra_run.RUNS)
def test_the_runs_that_are_compared_have_moved_every_trained_weight(folder, name):
    before = load_file(folder / "tokenizer" / "model.safetensors")
    after = weights_of(folder / f"{name}-many")
    moved = [key for key, value in before.items() if not torch.equal(after[f"model.vision_tower.{key}"], value)]
    assert moved
    assert {key.split(".")[0] for key in moved} == {"sem_vit"}


@pytest.mark.slow
def test_the_averages_of_all_processes_are_those_of_one(folder):
    for name in hydra_run.RUNS:
        averages = [load_file(folder / f"{name}-{runs}" / "stage1" / "final" / "model" / "model.safetensors")
                    for runs in ("one", "many")]  # fmt: skip
        torch.testing.assert_close(*averages, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_command_runs_under_a_launcher_and_speaks_once(folder, tmp_path, launcher):
    arguments = ["-m", "hydra_hf.cli", "train", "tiny.hydra", "--tokenizer", tiny_tokenizer(tmp_path), "--stage", "stage1",
                 "--num_steps", "1", "--out", tmp_path / "run"]  # fmt: skip
    out = start(*launcher, *arguments)
    assert out.count("tiny.hydra: stage stage1, 1 steps") == 1
    assert out.count(str(tmp_path / "run" / "stage1" / "final")) == 1
    assert (tmp_path / "run" / "stage1" / "final" / "model_index.json").exists()


def tiny_tokenizer(folder: Path) -> Path:
    """An untrained tokenizer of the tiny recipe's size."""
    from hydra_hf.modeling import HydraTokModel
    from hydra_hf.training.recipes import tiny

    config = tiny.tokenizer_config()
    config.decoder_config = tiny.tokenizer().stages[-1].decoder_config
    HydraTokModel(config).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"
