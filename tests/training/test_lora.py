from dataclasses import replace

import pytest
import torch
from hydra_run import STAGE, recipe
from safetensors.torch import load_file
from torch import nn

from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.training.checkpoints import last_whole_checkpoint
from hydra_hf.training.hydra_trainer import create_model, train_hydra
from hydra_hf.training.lora import (
    LORA,
    add_adapters,
    describe_modules,
    merge_adapters,
    save_adapters,
    trained_modules,
)
from hydra_hf.training.recipe import freeze_unnamed


pytest.importorskip("peft")
TASKS = {"understand": 2, "generate": 2}
SEM_VIT, LANGUAGE = "model.vision_tower.sem_vit", "model.language_model"
RATES = {"vision_head": 1e-3, "model.multi_modal_projector": 1e-3, SEM_VIT: 1e-3, LANGUAGE: 1e-3}
ADAPTED = replace(STAGE, lora_rank=2, learning_rates=RATES, tasks=TASKS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A stage with adapters: its recipe, and its folder."""
    folder = tmp_path_factory.mktemp("adapted")
    made = replace(recipe(folder, TASKS, lora_rank=2, learning_rates=RATES), save_every=2)
    train_hydra(made, folder / "run", only="stage1")
    return made, folder / "run" / "stage1"


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    ids = torch.tensor(
        [[1, 2, config.vision_start_token_id, *[config.image_token_id] * 5, config.vision_end_token_id, 3]]
    )
    latents = torch.randn(1, config.vision_config.latent_channels, 2, 2, generator=generator)
    return model.eval()(input_ids=ids, latents=latents, sigma=torch.tensor([0.5])).logits


@pytest.fixture
def adapted(finished):
    """An adapted model whose adapters do something, and the model it was made of."""
    base, model = create_model(finished[0]), create_model(finished[0])
    freeze_unnamed(model, ADAPTED)
    add_adapters(model, ADAPTED, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return base, model


def test_adapters_and_the_other_named_modules_are_trained_and_nothing_else(adapted):
    _, model = adapted
    for name, parameter in model.named_parameters():
        is_adapted = name.startswith((SEM_VIT, LANGUAGE))
        expected = LORA in name if is_adapted else name.startswith(tuple(RATES))
        assert parameter.requires_grad == expected, name


def test_adapters_stand_only_where_the_stage_trains(finished):
    model = create_model(finished[0])
    stage = replace(ADAPTED, learning_rates={"vision_head": 1e-3, SEM_VIT: 1e-3})
    freeze_unnamed(model, stage)
    add_adapters(model, stage, seed=0)
    places = {name.split(LORA)[0] for name, _ in model.named_parameters() if LORA in name}
    assert places
    assert all(place.startswith(SEM_VIT) for place in places)


def test_a_stage_that_trains_neither_module_is_refused(finished):
    with pytest.raises(ValueError, match=r"stage1: lora_rank=2, .* names none of"):
        add_adapters(create_model(finished[0]), replace(ADAPTED, learning_rates={"vision_head": 1e-3}), seed=0)


def test_the_merged_model_is_the_adapted_one_in_plain_layers(adapted):
    base, model = adapted
    before = logits_of(model)
    assert not torch.allclose(before, logits_of(base), atol=1e-3)
    merged = merge_adapters(model)
    torch.testing.assert_close(logits_of(merged), before, rtol=1e-5, atol=1e-5)
    assert set(merged.state_dict()) == set(base.state_dict())


def test_saved_adapters_are_opened_by_peft(adapted, tmp_path):
    from peft import PeftModel

    base, model = adapted
    with torch.no_grad():
        model.vision_head.out_proj.weight.normal_(generator=torch.Generator().manual_seed(2))  # trained in full
    save_adapters(model, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(opened), logits_of(model), rtol=1e-5, atol=1e-5)
    weights = [each.vision_head.out_proj.weight for each in (opened.base_model.model, model)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert opened.peft_config["default"].modules_to_save == trained_modules(model)


def test_heads_may_have_adapters_too(finished, tmp_path):
    model = create_model(finished[0])
    stage = replace(ADAPTED, lora_targets=(LANGUAGE, SEM_VIT, "vision_head"))
    freeze_unnamed(model, stage)
    add_adapters(model, stage, seed=0)
    assert {name.split(".")[-1] for name in trained_modules(model)} == {"multi_modal_projector"}
    assert any(name.startswith("vision_head") and LORA in name for name, _ in model.named_parameters())


def test_training_moves_the_adapters_and_leaves_their_base(finished):
    made, folder = finished
    base = dict(create_model(made).named_parameters())
    trained = load_file(folder / "checkpoint-3" / "model.safetensors")
    bases = {name: value for name, value in trained.items() if ".base_layer." in name}
    assert bases
    for name, value in bases.items():
        assert torch.equal(value, base[name.replace(".base_layer", "")]), name
    adapters = [value for name, value in trained.items() if "lora_B" in name]
    assert len(adapters) == len([name for name in bases if name.endswith("weight")])
    assert all(value.abs().max() > 0 for value in adapters)
    moved = {name for name, value in base.items() if name in trained and not torch.equal(trained[name], value)}
    assert {name.split(".")[0] for name in moved if not name.startswith("model.")} == {"vision_head"}
    assert {".".join(name.split(".")[:2]) for name in moved if name.startswith("model.")} == {
        "model.multi_modal_projector"
    }


def test_the_finished_model_opens_without_peft_and_differs_from_its_base(finished):
    made, folder = finished
    model = HydraForConditionalGeneration.from_pretrained(folder / "final" / "model")
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "base_layer" in name]
    weight = f"{LANGUAGE}.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(weight), create_model(made).get_parameter(weight))
    names = {path.name for path in (folder / "final" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_a_resumed_run_with_adapters_ends_as_the_unbroken_one(finished, tmp_path):
    made, folder = finished
    broken = tmp_path / "run" / "stage1"
    broken.mkdir(parents=True)
    (folder / "checkpoint-2").rename(broken / "checkpoint-2")
    assert last_whole_checkpoint(broken)
    again = train_hydra(made, tmp_path / "run", only="stage1")
    weights = [load_file(path / "model" / "model.safetensors") for path in (again, folder / "final")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_what_is_trained_and_what_is_frozen_is_said_with_its_numbers(adapted, finished):
    base, model = adapted
    freeze_unnamed(base, replace(ADAPTED, lora_rank=0))
    trained, frozen = describe_modules(base).splitlines()
    number = sum(parameter.numel() for parameter in base.vision_head.parameters())
    assert trained.startswith("trained: ")
    assert f"vision_head {number:,}" in trained
    assert "model.vision_tower.gen_vit" in frozen
    assert "lm_head" not in frozen  # tied, and counted where the word embeddings are
    trained, frozen, adapters = describe_modules(model).splitlines()
    assert "model.vision_tower " in frozen  # as a whole
    number = sum(parameter.numel() for name, parameter in model.named_parameters() if LORA in name)
    assert adapters == f"adapters: {number:,}"
