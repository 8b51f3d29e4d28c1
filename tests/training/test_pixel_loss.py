"""The loss of edits in pixels: against its definition, and in a run."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.modeling.grid import tokens_to_latents
from hydra_hf.toy.batches import ToyBundles, ToyData
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.objective import HydraObjective
from hydra_hf.training.recipe import HydraLossWeights
from hydra_hf.training.recipes import tiny
from toy_models import toy_pipeline, toy_video_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    toy_video_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(base):
    recipe = tiny.unimrg(str(base))
    stage = replace(recipe.stages[0], num_steps=2, tasks={"generate": 1, "edit": 4}, data=ToyData(), held_out=ToyData(is_held_out=True),
                    num_held_out=2, muon_scale=0.0, warmup_steps=1, mixed_precision="no", drop_prompt=0.4,
                    loss_weights=HydraLossWeights(pixels=2.0))  # fmt: skip
    return replace(recipe, stages=(stage,), log_every=1, save_every=1, sample_every=100, sample_prompts=("a cat",))


def edits_of(recipe, index: int = 0) -> tuple[dict, HydraObjective]:
    stage = recipe.stages[0]
    return ToyBundles(stage.data, recipe.processor, stage, seed=0)[index], HydraObjective(stage, seed=0)


def test_it_is_the_squared_error_of_the_decoded_edits_alone(recipe):
    model = toy_video_pipeline().model.eval()
    bundle, objective = edits_of(recipe)
    batch = objective.prepare(model, bundle, "edit")
    is_edit = batch["num_sources"][batch["is_generated"]] > 0
    assert 0 < is_edit.sum() < len(is_edit)  # some have no source: guidance is learnt from them
    assert objective.count_targets(model, bundle["edit"])["pixels"] == is_edit.sum()

    velocity = torch.randn(batch["velocity_target"].shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outputs = SimpleNamespace(language_loss=None, flow_loss=velocity.square().mean(), velocity=velocity)
    loss = objective.losses_of(model, batch, outputs)["pixels"]

    shape = (-1, 16, velocity.shape[1])  # 4 x 4 tokens for each image
    noisy = batch["latents"].view(shape)[batch["is_generated"]]
    sigma = batch["sigma"][batch["is_generated"], None, None]
    tokens = [(noisy - sigma * v.view(shape))[is_edit] for v in (velocity, batch["velocity_target"])]
    predicted, true = (model.model.vision_tower.decode(tokens_to_latents(each, (1, 4, 4))).sample for each in tokens)
    torch.testing.assert_close(loss, (predicted - true).square().mean())
    loss.backward()
    reached = velocity.grad.view(shape).abs().amax((1, 2)) > 0
    assert torch.equal(reached, is_edit)

    exact = SimpleNamespace(language_loss=None, flow_loss=None, velocity=batch["velocity_target"])
    assert objective.losses_of(model, batch, exact)["pixels"] < 1e-10


def test_edits_without_any_source_have_none(recipe):
    stage = replace(recipe.stages[0], drop_prompt=1.0)
    bundle, objective = edits_of(replace(recipe, stages=(stage,)))
    model = toy_video_pipeline().model.eval()
    batch = objective.prepare(model, bundle, "edit")
    losses = objective.losses_of(model, batch, model(**batch))
    assert losses["pixels"] == 0
    assert losses["flow"] > 0
    assert objective.count_targets(model, bundle["edit"])["pixels"] == 0


def test_a_run_minimises_it_and_leaves_the_decoder_as_it_is(recipe, tmp_path):
    before = toy_video_pipeline().model.model.vision_tower.pixel_decoder.state_dict()
    stage = recipe.stages[0]
    plain = replace(stage, name="plain", loss_weights=HydraLossWeights())
    rows = {}
    for each in (stage, plain):
        folder = train_hydra(replace(recipe, stages=(each,)), tmp_path / each.name)
        lines = (tmp_path / each.name / each.name / "log.jsonl").read_text().splitlines()
        rows[each.name] = list(map(json.loads, lines))
        model = HydraForConditionalGeneration.from_pretrained(folder, subfolder="model", dtype=torch.float32)
        for name, value in model.model.vision_tower.pixel_decoder.state_dict().items():
            torch.testing.assert_close(value, before[name].bfloat16().float(), rtol=0, atol=0)  # as it is saved
    with_pixels, without = rows[stage.name], rows["plain"]
    step, plain_step = with_pixels[0], without[0]
    assert step["edit/flow"] == plain_step["edit/flow"]
    assert step["edit/pixels"] > 0
    assert step["loss"] == pytest.approx(plain_step["loss"] + 2 * step["edit/pixels"], rel=1e-4)
    assert step["grad_norm"] != plain_step["grad_norm"]
    assert any("held_out/edit/pixels" in row for row in with_pixels)
    assert not any("held_out/generate/pixels" in row for row in with_pixels)  # a prompt has no source
    assert not any("pixels" in name for row in without for name in row)


def test_a_decoder_that_samples_is_refused(recipe, tmp_path):
    toy_pipeline().save_pretrained(tmp_path / "flow")
    other = tiny.unimrg(str(tmp_path / "flow"))
    with pytest.raises(ValueError, match="needs a decoder that regresses pixels, got PixelFlowDecoderConfig"):
        train_hydra(replace(other, stages=recipe.stages), tmp_path / "run")
