"""The runner of stages, and what a run folder remembers: its recipe, its data, and who is in it."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hydra_hf.data.sources import Source, Sources
from hydra_hf.modeling import HydraTokConfig, PixelViTDecoderConfig
from hydra_hf.training.interruption import TrainingInterruptedError
from hydra_hf.training.recipe import Recipe, TokenizerStage
from hydra_hf.training.stages import run_stages


@dataclass(frozen=True)
class Numbers:
    """Data that is nothing but its fields."""

    highest: int = 3


STAGE = TokenizerStage(
    name="first", num_steps=5, learning_rates={"model": 1e-3}, batch_size=4, decoder_config=PixelViTDecoderConfig(),
    data=Numbers(),
)  # fmt: skip
RECIPE = Recipe(name="counting", config=HydraTokConfig(), stages=(STAGE, replace(STAGE, name="second")))


class Training:
    """What a trainer does to the folder, and a list of what it was asked for."""

    def __init__(self, interrupted: str | None = None, finishes: bool = True):
        self.interrupted, self.finishes, self.calls = interrupted, finishes, []

    def __call__(self, index: int, previous: Path | None, folder: Path) -> None:
        self.calls.append((folder.name, previous and previous.parent.name))
        (folder / "checkpoint-2").mkdir(exist_ok=True)
        if folder.name == self.interrupted:
            raise TrainingInterruptedError(folder.name, 2, 15)
        if self.finishes:
            (folder / "final").mkdir()


def write_final(last: Path, final: Path) -> None:
    final.mkdir(exist_ok=True)
    (final / "from.txt").write_text(last.parent.name)


def run(recipe: Recipe, folder: Path, **kwargs) -> list:
    training = kwargs.pop("training", Training())
    run_stages(recipe, folder, training, finish=write_final, **kwargs)
    return training.calls


# Stages


def test_every_stage_starts_from_the_one_before_it_and_final_from_the_last(tmp_path):
    assert run(RECIPE, tmp_path) == [("first", None), ("second", "first")]
    assert (tmp_path / "final" / "from.txt").read_text() == "second"
    assert run(RECIPE, tmp_path) == []


def test_one_stage_alone_and_final_once_all_are_done(tmp_path):
    assert run_stages(RECIPE, tmp_path, Training(), finish=write_final, only="first") == tmp_path / "first" / "final"
    assert not (tmp_path / "final").exists()
    assert run(RECIPE, tmp_path, only="second") == [("second", "first")]
    assert (tmp_path / "final" / "from.txt").exists()


def test_a_stage_that_is_trained_again_renews_final(tmp_path):
    run(RECIPE, tmp_path)
    shutil.rmtree(tmp_path / "second" / "final")
    (tmp_path / "final" / "from.txt").write_text("old")
    assert run(RECIPE, tmp_path, only="second") == [("second", "first")]
    assert (tmp_path / "final" / "from.txt").read_text() == "second"


def test_an_interrupted_stage_has_no_final_and_the_next_run_resumes_it(tmp_path):
    with pytest.raises(
        TrainingInterruptedError, match="first stopped at step 2 by SIGTERM; the same command resumes it"
    ):
        run(RECIPE, tmp_path, training=Training(interrupted="first"))
    assert not (tmp_path / "first" / "final").exists()
    assert run(RECIPE, tmp_path) == [("first", None), ("second", "first")]


def test_a_stage_that_is_not_there_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"counting has no stage 'third'; its stages are \['first', 'second'\]"):
        run(RECIPE, tmp_path / "run", only="third")
    assert not (tmp_path / "run").exists()


# The record


CHANGES = {
    "name='counting'": replace(RECIPE, name="other"),
    "seed=0": replace(RECIPE, seed=1),
    "config.hidden_size=1024": replace(RECIPE, config=HydraTokConfig(hidden_size=512)),
    "first.num_steps=5": RECIPE.with_overrides(num_steps=9),
    "first.batch_size=4": RECIPE.with_overrides(batch_size=8),
    "first.learning_rates=": RECIPE.with_overrides(learning_rates={"model": 1e-4}),
    "first.loss_weights.kl=0.0001": RECIPE.with_overrides(loss_weights=replace(STAGE.loss_weights, kl=0.0)),
    "first.data=": RECIPE.with_overrides(data=Numbers(4)),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_folder_of_another_recipe_is_refused_by_the_name_of_the_field(tmp_path, field):
    run(RECIPE, tmp_path)
    with pytest.raises(ValueError, match=f"was made with {field}.*, but this run has"):
        run(CHANGES[field], tmp_path)


def test_what_does_not_decide_the_outcome_may_change(tmp_path):
    run(RECIPE, tmp_path, training=Training(finishes=False))
    faster = replace(RECIPE, save_every=7, log_every=3, micro_batch_size=2, gradient_checkpointing=True)
    assert run(faster, tmp_path)


def test_a_folder_in_which_nothing_is_saved_yet_may_be_of_anything(tmp_path):
    def fail(*_) -> None:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        run_stages(RECIPE, tmp_path, fail)
    assert run(replace(RECIPE, seed=1), tmp_path)


def test_each_stage_has_its_own_data(tmp_path):
    run(RECIPE, tmp_path, only="first")
    other = RECIPE.with_overrides(data=Numbers(7))
    assert run(other, tmp_path, only="second") == [("second", "first")]
    with pytest.raises(ValueError, match=r"second\.data="):
        run(RECIPE.with_overrides(data=Numbers(8)), tmp_path, only="second")


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_an_unfinished_stage_may_get_more_steps_where_its_rate_does_not_fall(tmp_path, share):
    recipe = RECIPE.with_overrides(decay_share=share)
    run(recipe, tmp_path, only="first", training=Training(finishes=False))
    if share:
        with pytest.raises(ValueError, match=r"first\.num_steps=5, but this run has 6"):
            run(recipe.with_overrides(num_steps=6), tmp_path)
    else:
        assert run(recipe.with_overrides(num_steps=6), tmp_path)
        with pytest.raises(ValueError, match=r"first\.num_steps=6"):
            run(recipe.with_overrides(num_steps=4), tmp_path)


def test_files_of_the_data_that_have_changed_are_noticed_and_moved_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"text": "a cat"}\n')

    def recipe(folder: str) -> Recipe:
        return RECIPE.with_overrides(data=Sources((Source(task="text", path=str(tmp_path / folder / "*.jsonl")),)))

    run(recipe("data"), tmp_path / "run")
    (tmp_path / "data").rename(tmp_path / "moved")
    assert run(recipe("moved"), tmp_path / "run") == []
    (tmp_path / "moved" / "a.jsonl").write_text('{"text": "a dog"}\n')  # as long as before
    with pytest.raises(ValueError, match=r"was made with other first\.data: .*a\.jsonl has other contents"):
        run(recipe("moved"), tmp_path / "run")


def test_the_model_that_a_run_starts_from_is_known_by_its_weights(tmp_path):
    for name in ("init", "copy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights" if name != "other" else b"WEIGHTS")
    run(replace(RECIPE, init=str(tmp_path / "init")), tmp_path / "run")
    assert run(replace(RECIPE, init=str(tmp_path / "copy")), tmp_path / "run") == []
    with pytest.raises(ValueError, match="was made with init="):
        run(replace(RECIPE, init=str(tmp_path / "other")), tmp_path / "run")


def test_a_damaged_record_is_not_trusted(tmp_path):
    run(RECIPE, tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        run(RECIPE, tmp_path)


def test_a_folder_without_a_record_is_resumed_with_a_warning(tmp_path, caplog):
    run(RECIPE, tmp_path)
    (tmp_path / "run.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert run(RECIPE, tmp_path) == []
    assert "so it is not known what it was made with" in caplog.text


def test_other_versions_are_said_and_not_refused(tmp_path, caplog):
    run(RECIPE, tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    record["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING):
        run(RECIPE, tmp_path)
    assert "was begun with {'torch': '1.0'" in caplog.text


# The lock


HOLD = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"


def test_a_second_run_in_the_same_folder_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr("hydra_hf.files.LOCK_SECONDS", 0)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run.lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is in use by another run"):
            run(RECIPE, tmp_path)
        assert not (tmp_path / "first").exists()
    finally:
        other.kill()
        other.wait()
    assert run(RECIPE, tmp_path)
