"""A training run on the Hub: mirrored while it trains, resumed on another machine, opened as a model once it is done."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel

from hydra_hf.modeling import HydraTokConfig, HydraTokModel, PixelViTDecoderConfig
from hydra_hf.publishing.run import RunUploader
from hydra_hf.training.interruption import TrainingInterruptedError
from hydra_hf.training.recipe import Recipe, TokenizerStage
from hydra_hf.training.stages import run_stages
from tiny_models import make_tok_config


@dataclass(frozen=True)
class Numbers:
    """Data that is nothing but its fields."""

    highest: int = 3


STAGE = TokenizerStage(
    name="first", num_steps=5, learning_rates={"model": 1e-3}, batch_size=4, decoder_config=PixelViTDecoderConfig(),
    data=Numbers(),
)  # fmt: skip
RECIPE = Recipe(
    name="counting", config=HydraTokConfig(), stages=(STAGE, replace(STAGE, name="second")), push_to="me/run"
)


class Training:
    """What a trainer does to the folder, without the weights, and a list of the stages that it was asked for."""

    def __init__(self, interrupted: str | None = None):
        self.interrupted, self.calls = interrupted, []

    def __call__(self, index: int, previous: Path | None, folder: Path) -> None:
        self.calls.append(folder.name)
        (folder / "log.jsonl").write_text('{"step": 2}\n')
        (folder / "checkpoint-2").mkdir(exist_ok=True)
        (folder / "checkpoint-2" / "step.json").write_text("{}")
        if folder.name == self.interrupted:
            raise TrainingInterruptedError(folder.name, 2, 15)
        (folder / "final").mkdir()
        (folder / "final" / "done.txt").write_text("done")


def finish(last: Path, final: Path) -> None:
    HydraTokModel(make_tok_config()).save_pretrained(final)


def test_a_run_is_resumed_on_another_machine_and_then_opens_as_a_model(hub, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    with pytest.raises(TrainingInterruptedError):
        run_stages(RECIPE, here, Training(interrupted="second"), finish=finish)
    names = set(hub.files("models/me/run"))
    assert {"training/run.json", "training/first/final/done.txt", "training/second/checkpoint-2/step.json"} <= names
    assert "config.json" not in names
    assert not [name for name in names if name.endswith("run.lock")]

    training = Training()
    run_stages(RECIPE, there, training, finish=finish)
    assert training.calls == ["second"]
    assert (there / "second" / "checkpoint-2" / "step.json").exists()
    assert isinstance(AutoModel.from_pretrained("me/run"), HydraTokModel)
    card = ModelCard(hub.files("models/me/run")["README.md"].decode())
    assert "| first | | Numbers, made while training | |" in card.text
    assert "hydra train counting" in card.text


def test_what_a_run_removes_is_removed_from_the_hub_too(hub, tmp_path):
    HfApi().create_repo("me/mirror")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "step.json").write_text("1")
    (tmp_path / "half.tmp").mkdir()
    (tmp_path / "half.tmp" / "step.json").write_text("2")
    with RunUploader("me/mirror", tmp_path, every=1000) as uploader:
        uploader.trigger().result()
        assert {name for name in hub.files("models/me/mirror") if name.startswith("training")} == {
            "training/checkpoint-1/step.json"
        }
        (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-2")
        uploader.trigger().result()
        with hub.recording() as requests:
            assert uploader.trigger().result() is None
        assert not requests
    assert {name for name in hub.files("models/me/mirror") if name.startswith("training")} == {
        "training/checkpoint-2/step.json"
    }


def test_a_run_does_not_begin_with_a_wrong_token(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    training = Training()
    with pytest.raises(OSError, match="Invalid credentials"):
        run_stages(RECIPE, tmp_path, training, finish=finish)
    assert not training.calls
