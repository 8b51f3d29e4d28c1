"""FSDP2 and ZeRO-2 on two processes, as the files of examples/accelerate say: the bf16 run of one process, resumed too."""

import json
from pathlib import Path

import hydra_run
import pytest
import sharded_run
import torch
from safetensors.torch import load_file
from test_vision_tower_processes import EXAMPLES, free_port, run
from vision_tower_run import write_judges

from hydra_hf.training.hydra_trainer import train_hydra


FINAL = {"vision_tower": "final", "hydra": "stage1/final/model"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the judges and the runs of one process."""
    folder = tmp_path_factory.mktemp("sharded")
    write_judges(folder / "judges")
    sharded_run.run(folder / "one", folder / "judges")
    return folder


@pytest.fixture(scope="module", params=["fsdp", "deepspeed"])
def sharded(request, folder) -> tuple[str, Path]:
    """The launcher, and the runs of two processes under it."""
    name = request.param
    if name == "deepspeed":
        pytest.importorskip("deepspeed")
    code, errors = run(
        "-m", "accelerate.commands.launch", "--config_file", EXAMPLES / f"{name}.yaml", "--num_processes=2",
        f"--main_process_port={free_port()}", sharded_run.__file__, folder / name, folder / "judges",
    )  # fmt: skip
    assert code == 0, errors
    return name, folder / name


def losses_of(folder: Path) -> dict[int, dict]:
    """By step, without scores and times."""
    (path,) = folder.rglob("log.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    extra = ("psnr", "ssim", "epoch")
    return {
        record["step"]: {name: value for name, value in record.items() if name not in extra}
        for record in records
        if "loss" in record
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", FINAL)
def test_a_sharded_run_is_the_run_of_one_process(folder, sharded, model):
    expected = losses_of(folder / "one" / model / "whole")
    for run_name, steps in (("whole", {1, 2, 3}), ("resumed", {3})):
        losses = losses_of(sharded[1] / model / run_name)
        assert steps <= losses.keys() <= {1, 2, 3}
        for step, record in losses.items():
            assert record == pytest.approx(expected[step], rel=3e-3)  # the norm of the gradients; losses are nearer
            assert record["loss"] == pytest.approx(expected[step]["loss"], rel=3e-4)


@pytest.mark.slow
def test_edits_of_which_some_have_no_source_are_those_of_one_process(folder, sharded):
    losses, expected = (losses_of(path / "edits" / "whole") for path in (sharded[1], folder / "one"))
    assert losses.keys() == expected.keys() >= {1, 2}
    for step, record in losses.items():
        assert record == pytest.approx(expected[step], rel=3e-3, abs=5e-5)
        assert record["edit/pixels"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", FINAL)
def test_what_a_sharded_run_gives_is_whole_fp32_and_the_same_once_resumed(folder, sharded, model):
    paths = [sharded[1] / model / name / FINAL[model] / "model.safetensors" for name in ("whole", "resumed")]
    whole, resumed = map(load_file, paths)
    assert {value.dtype for value in whole.values()} == {torch.float32}
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    one = load_file(folder / "one" / model / "whole" / FINAL[model] / "model.safetensors")
    torch.testing.assert_close(whole, one, rtol=0, atol=3e-4)  # Adam makes whole steps of rounding errors


@pytest.mark.slow
def test_what_we_write_of_a_sharded_checkpoint_is_no_pickle(sharded):
    """The shards themselves are in the format of torch or DeepSpeed."""
    name, runs = sharded
    paths = [path for path in runs.rglob("*") if path.suffix in (".pt", ".pkl", ".bin", ".pth")]
    shards = {"fsdp": "", "deepspeed": "_states.pt"}[name]
    assert [path.name for path in paths if not (shards and path.name.endswith(shards))] == []
    assert len([*(runs / "hydra").rglob("scheduler.json")]) == 4  # after steps 2 and 3, of two runs


@pytest.mark.slow
def test_a_sharded_checkpoint_is_refused_by_one_process(folder, sharded, tmp_path):
    name, runs = sharded
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "checkpoint-2").symlink_to(runs / "hydra" / "whole" / "stage1" / "checkpoint-2")
    recipe = hydra_run.recipe(folder / "one" / "hydra", hydra_run.RUNS["even"][0], **sharded_run.STAGE)
    launcher = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}[name]
    with pytest.raises(ValueError, match=f"was saved under {launcher}, and this run uses DDP"):
        train_hydra(recipe, tmp_path, only="stage1")
