"""Every preset of the vision tower trains under every choice of losses, on one process and on two."""

import json

import presets_run
import pytest
import torch
from safetensors.torch import load_file
from test_vision_tower_processes import launch_program

from hydra_hf.cli import main
from hydra_hf.modeling import HydraTokModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets")
    presets_run.write_teachers(folder)
    return folder


@pytest.mark.parametrize("name", presets_run.RUNS)
def test_every_parameter_that_is_trained_has_a_gradient(folder, tmp_path, caplog, name):
    """Or DDP waits for it. What no loss reaches is frozen and named."""
    trainer = presets_run.make_trainer(folder, name, tmp_path)
    trainer.train_step()
    (adamw,) = trainer.optimizer.optimizer.parts
    parameters = {n: p for n, p in trainer.model.named_parameters() if p.numel()}
    trained = {n for n, p in parameters.items() if p.requires_grad}
    assert trained == {n for n, p in parameters.items() if p in adamw.state}
    unreached = presets_run.RUNS[name][-1]
    frozen = {n.removeprefix("model.") for n in parameters.keys() - trained}
    assert {module for module in unreached if any(n.startswith(f"{module}.") for n in frozen)} == set(unreached)
    assert all(n.startswith(tuple(unreached)) for n in frozen)
    assert ("no loss reaches" in caplog.text) == bool(unreached)


def test_a_stage_without_losses_is_refused(folder, tmp_path, monkeypatch):
    weights = {**vars(presets_run.PLAIN), "flow": 0.0, "kl": 0.0}
    nothing = (presets_run.INTERNVIT, presets_run.TokenizerLossWeights(**weights), (), [])
    monkeypatch.setitem(presets_run.RUNS, "nothing", nothing)
    with pytest.raises(ValueError, match="all has no loss"):
        presets_run.make_trainer(folder, "nothing", tmp_path)


def test_a_full_size_recipe_without_data_is_an_error_before_anything_is_written(capsys, tmp_path):
    init, out = tmp_path / "init", tmp_path / "run"
    HydraTokModel(presets_run.INTERNVIT).save_pretrained(init)
    assert main(["train", "hydra_tok.internvit_300m", "--init", str(init), "--out", str(out)]) == 2
    assert "hydra_tok.internvit_300m needs data: images to train on" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_two_processes_train_and_resume_every_preset_as_one_does(folder):
    presets_run.run(folder, folder / "one")
    launch_program(2, presets_run.__file__, folder)
    for name in presets_run.RUNS:
        one, many = (folder / runs / name for runs in ("one", "many"))
        logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, many)]
        assert [record["step"] for record in logs[1]] == [3]
        assert logs[1][0] == pytest.approx(logs[0][0], rel=1e-4, abs=1e-5)
        weights = [load_file(run / "checkpoint-3" / "model.safetensors") for run in (one, many)]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
