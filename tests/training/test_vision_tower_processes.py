"""Several processes train as one does; they talk through gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from vision_tower_run import last_checkpoint, write_judges


RUN = Path(__file__).with_name("vision_tower_run.py")
EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    write_judges(folder)
    return folder


def run(*command: object, timeout: int = 900) -> tuple[int, str]:
    """Exit code and stderr of a program; no process that it starts outlives the test."""
    path = os.pathsep.join([str(RUN.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, start_new_session=True, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, errors[-5000:]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch_program(num_processes: int, *command: object) -> None:
    port = f"--master_port={free_port()}"
    code, errors = run("-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", port, *command)
    assert code == 0, errors


def launch(num_processes: int, *arguments: object) -> None:
    launch_program(num_processes, RUN, *arguments)


def log_of(folder: Path) -> dict[int, dict]:
    return {record["step"]: record for record in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}


def assert_same_run(first: Path, second: Path) -> None:
    logs = [log_of(folder) for folder in (first, second)]
    assert logs[0].keys() == logs[1].keys() == {1, 2, 3}
    for step in logs[0]:
        assert logs[0][step] == pytest.approx(logs[1][step], rel=1e-4, abs=1e-5)
    for name in ("model", "ema", "discriminator"):
        weights = [load_file(last_checkpoint(folder) / f"{name}.safetensors") for folder in (first, second)]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


@pytest.mark.slow  # three runs that import everything anew
def test_two_processes_train_as_one_does(judges, tmp_path):
    """With every judge and the adaptive weight; and with half the batch at a time."""
    launch(1, tmp_path / "one", judges)
    launch(2, tmp_path / "two", judges)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_that_accumulate_train_as_one_does(judges, tmp_path):
    launch(1, tmp_path / "one", judges, 4)
    launch(2, tmp_path / "two", judges, 1)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def accelerate_train(folder: Path, micro_batch_size: int) -> tuple[int, str]:
    return run(
        "-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "multi_gpu.yaml", "--num_processes=2",
        f"--main_process_port={free_port()}", "-m", "hydra_hf.cli", "train", "tiny.tokenizer", "--num_steps=2",
        f"--micro_batch_size={micro_batch_size}", "--out", folder,
    )  # fmt: skip


@pytest.mark.slow
def test_accelerate_launches_every_stage_on_two_processes(tmp_path):
    code, errors = accelerate_train(tmp_path, micro_batch_size=8)
    assert code == 0, errors
    for stage in ("foundation", "decoder"):
        assert log_of(tmp_path / stage)[2]["psnr"] > 0
    config = json.loads((tmp_path / "decoder" / "final" / "config.json").read_text())
    assert config["model_type"] == "hydra_tok"


@pytest.mark.slow
def test_accelerate_launches_as_many_processes_as_it_is_told(tmp_path):
    code, errors = accelerate_train(tmp_path, micro_batch_size=32)  # the whole batch, for each of two
    assert code != 0
    assert "num_processes=2 times micro_batch_size=32" in errors


@pytest.mark.parametrize("name", ["multi_gpu", "fsdp", "deepspeed"])
def test_the_launch_configurations_are_those_of_this_accelerate(name):
    """Loading refuses a key that it does not know."""
    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert config.distributed_type.name.lower() == name
    assert (EXAMPLES.parents[1] / config.deepspeed_config.get("deepspeed_config_file", "README.md")).is_file()


@pytest.mark.slow
def test_two_processes_train_on_images_and_clips_as_one_does(tmp_path):
    """The statistics of the latents, which are saved with the model, are measured over all processes."""
    for number in (1, 2):
        launch_program(number, RUN.with_name("clip_run.py"), tmp_path / str(number))
    folders = [tmp_path / str(number) / "decoder" for number in (1, 2)]
    weights = [load_file(folder / "final" / "model.safetensors") for folder in folders]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in folders]
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
    assert {"video_distill", "clip_video_distill"} <= {name for record in logs[0] for name in record}
