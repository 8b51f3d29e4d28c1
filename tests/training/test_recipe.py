from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from hydra_hf.modeling import (
    HydraConfig,
    HydraForConditionalGeneration,
    HydraTokForPreTraining,
    HydraTokModel,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
)
from hydra_hf.training.recipe import Stage, freeze_unnamed
from hydra_hf.training.recipes import tiny


STAGE = Stage(name="stage", num_steps=100, learning_rates={"body": 1e-3, "body.head": 1e-4}, warmup_steps=10)


def trained_names(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def under(module: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in module.named_parameters() if name.startswith(prefixes)}


@pytest.fixture(scope="module")
def hydra_recipe(tmp_path_factory):
    """`tiny.hydra` on an untrained tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    config = tiny.tokenizer_config()
    config.decoder_config = tiny.tokenizer().stages[-1].decoder_config
    HydraTokModel(config).save_pretrained(folder)
    return tiny.hydra(str(folder))


@pytest.fixture(scope="module")
def hydra_model(hydra_recipe):
    with torch.device("meta"):
        return HydraForConditionalGeneration(hydra_recipe.config)


def test_the_longest_prefix_gives_the_rate():
    assert STAGE.learning_rate_of("body.layer.weight") == 1e-3
    assert STAGE.learning_rate_of("body.head.weight") == 1e-4


def test_what_is_not_named_has_rate_zero():
    assert STAGE.learning_rate_of("other.body.weight") == 0


def test_the_rate_warms_up_stays_and_falls_to_a_twentieth():
    factors = [STAGE.learning_rate_factor(step) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:61] == [1.0] * 51
    assert factors[61:98] == pytest.approx([(100 - step) / 40 for step in range(61, 98)])
    assert factors[98:] == [0.05] * 3


def test_a_stage_without_decay_ends_at_its_full_rate():
    stage = replace(STAGE, decay_share=0.0)
    assert [stage.learning_rate_factor(step) for step in (50, 99)] == [1.0, 1.0]


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_stage_without_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps={num_steps}"):
        replace(STAGE, num_steps=num_steps)


def test_a_stage_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        STAGE.num_steps = 1


def test_freeze_unnamed_trains_the_named_and_nothing_else():
    module = nn.ModuleDict({"body": nn.Linear(2, 2), "rest": nn.Linear(2, 2)})
    freeze_unnamed(module, replace(STAGE, learning_rates={"body": 1.0}))
    assert trained_names(module) == {"body.weight", "body.bias"}
    freeze_unnamed(module, replace(STAGE, learning_rates={"rest": 1.0}))
    assert trained_names(module) == {"rest.weight", "rest.bias"}


def test_freeze_unnamed_refuses_a_name_that_fits_no_parameter():
    with pytest.raises(ValueError, match=r"stage: learning_rates names 'body\.head'"):
        freeze_unnamed(nn.ModuleDict({"body": nn.Linear(2, 2)}), STAGE)


def test_an_override_reaches_every_stage_and_changes_nothing_else():
    recipe = tiny.tokenizer()
    changed = recipe.with_overrides(num_steps=7)
    assert [stage.num_steps for stage in changed.stages] == [7, 7, 7]
    assert [replace(new, num_steps=old.num_steps) for new, old in zip(changed.stages, recipe.stages)] == list(
        recipe.stages
    )


def test_an_override_of_a_field_that_no_stage_has_is_refused():
    with pytest.raises(ValueError, match=r"tiny\.tokenizer has no \['steps'\].*num_steps"):
        tiny.tokenizer().with_overrides(steps=7)


# The tiny recipes


def test_the_tokenizer_gets_a_regressing_decoder_first_and_the_flow_decoder_last():
    foundation, semantics, decoder = tiny.tokenizer().stages
    assert (foundation.name, semantics.name, decoder.name) == ("foundation", "semantics", "decoder")
    assert isinstance(foundation.decoder_config, PixelViTDecoderConfig)
    assert isinstance(decoder.decoder_config, PixelFlowDecoderConfig)


def test_the_decoder_stage_freezes_the_encoder_of_the_tokenizer():
    recipe = tiny.tokenizer()
    config = tiny.tokenizer_config()
    config.decoder_config = recipe.stages[-1].decoder_config
    with torch.device("meta"):
        model = HydraTokForPreTraining(config)
    freeze_unnamed(model, recipe.stages[-1])
    assert trained_names(model) == under(model, "model.pixel_decoder", "model.bottleneck.decoder_up_proj")


def test_the_stages_of_tiny_hydra_follow_the_paper(hydra_recipe):
    assert isinstance(hydra_recipe.config, HydraConfig)
    names = ["stage1", "stage2_describe", "stage2_find", "stage2", "stage3", "stage3_small"]
    assert [stage.name for stage in hydra_recipe.stages] == names
    assert [stage.data.max_objects for stage in hydra_recipe.stages] == [1, 4, 4, 4, 4, 4]
    assert [set(stage.tasks) for stage in hydra_recipe.stages] == [{"understand", "generate"}] * 3 + [
        {"understand", "generate", "reconstruct", "depth", "segment"}
    ] * 3
    shares = [stage.tasks["generate"] / stage.tasks["understand"] for stage in hydra_recipe.stages]
    assert shares[0] == 3  # the paper's 0 : 1 : 3
    assert max(shares[1:3]) < 1  # what the language model learns first is about questions


def test_stage_one_freezes_the_language_model(hydra_recipe, hydra_model):
    freeze_unnamed(hydra_model, hydra_recipe.stages[0])
    heads = under(hydra_model, "vision_head", "model.multi_modal_projector", "model.time_embedding")
    assert trained_names(hydra_model) == heads
    assert not any("language_model" in name or "lm_head" in name for name in heads)


def test_later_stages_train_the_language_model_too_and_never_what_makes_or_reads_latents(hydra_recipe, hydra_model):
    for stage in hydra_recipe.stages[1:]:
        freeze_unnamed(hydra_model, stage)
        names = trained_names(hydra_model)
        assert names >= under(hydra_model, "model.language_model")
        tower = "model.vision_tower."
        frozen = ("gen_vit", "pixel_decoder", "bottleneck.down_proj", "bottleneck.decoder_up_proj")
        assert names.isdisjoint(under(hydra_model, *(tower + name for name in frozen)))
        assert (names >= under(hydra_model, f"{tower}sem_vit")) == (stage.name in ("stage2", "stage3", "stage3_small"))
