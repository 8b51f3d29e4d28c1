import copy

import pytest
import torch
from torch import nn

from hydra_hf.modeling import HydraTokForPreTraining
from hydra_hf.training.optimizers import create_optimizer, shardable
from hydra_hf.training.recipe import Stage, freeze_unnamed


def make_stage(muon_scale: float = 3.0, **learning_rates: float) -> Stage:
    rates = {name.replace("__", "."): rate for name, rate in learning_rates.items()}
    return Stage(name="stage", num_steps=10, learning_rates=rates, muon_scale=muon_scale, weight_decay=0.1)


EVERYTHING = make_stage(model=1e-3, lm_head=1e-3, vision_head=2e-3)


@torch.no_grad()
def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None


def names_of(model: nn.Module, optimizer, *, muon: bool) -> set[str]:
    parameters = {
        parameter
        for part in optimizer.parts
        if isinstance(part, torch.optim.Muon) == muon
        for group in part.param_groups
        for parameter in group["params"]
    }
    return {name for name, parameter in model.named_parameters() if parameter in parameters}


def test_muon_gets_matrices_of_hidden_layers_only(tiny_model):
    optimizer = create_optimizer(tiny_model, EVERYTHING)
    names = names_of(tiny_model, optimizer, muon=True)
    assert all(name.endswith(".weight") and tiny_model.get_parameter(name).ndim == 2 for name in names)
    others = (
        "embed_tokens",
        "lm_head",
        "embeddings",
        "modulation",
        "decoder.out_proj",
        "head.out_proj",
        "patch_embedding",
    )
    assert not [name for name in names if any(other in name for other in others)]
    hidden = (
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.1.mlp.down_proj.weight",
        "model.vision_tower.bottleneck.down_proj.weight",
        "model.multi_modal_projector.linear.weight",
    )
    assert names >= set(hidden)


def test_adamw_gets_all_that_muon_does_not(tiny_model):
    optimizer = create_optimizer(tiny_model, EVERYTHING)
    muon, adamw = (names_of(tiny_model, optimizer, muon=muon) for muon in (True, False))
    assert muon.isdisjoint(adamw)
    assert muon | adamw == {name for name, _ in tiny_model.named_parameters()}
    assert {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"} <= adamw


def test_a_decoder_reads_and_writes_patches_through_adamw(tiny_tok_config):
    model = HydraTokForPreTraining(tiny_tok_config)
    names = names_of(model, create_optimizer(model, make_stage(model=1e-3)), muon=False)
    assert {f"model.pixel_decoder.{name}.weight" for name in ("patch_embedding", "out_proj", "modulation")} <= names


def test_without_a_scale_muon_gets_nothing(tiny_model):
    optimizer = create_optimizer(tiny_model, make_stage(muon_scale=0.0, model=1e-3, lm_head=1e-3, vision_head=1e-3))
    assert [type(part) for part in optimizer.parts] == [torch.optim.AdamW]


def test_a_tied_head_is_counted_once(tiny_model):
    assert tiny_model.lm_head.weight is tiny_model.model.language_model.embed_tokens.weight
    parameters = [p for group in create_optimizer(tiny_model, EVERYTHING).param_groups for p in group["params"]]
    assert len(parameters) == len({id(parameter) for parameter in parameters}) == len(list(tiny_model.parameters()))


def test_rates_follow_the_longest_name_and_muons_is_scaled(tiny_model):
    optimizer = create_optimizer(tiny_model, EVERYTHING)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[tiny_model.vision_head.get_parameter("out_proj.bias")] == 2e-3
    assert rates[tiny_model.model.multi_modal_projector.linear.bias] == 1e-3
    assert rates[tiny_model.model.multi_modal_projector.linear.weight] == pytest.approx(3e-3)


def test_frozen_parameters_are_not_in_the_optimizer(tiny_model):
    stage = make_stage(vision_head=1e-3)
    freeze_unnamed(tiny_model, stage)
    optimizer = create_optimizer(tiny_model, stage)
    names = names_of(tiny_model, optimizer, muon=True) | names_of(tiny_model, optimizer, muon=False)
    assert names == {name for name, _ in tiny_model.named_parameters() if name.startswith("vision_head")}


def test_an_optimizer_of_nothing_is_refused(tiny_model):
    tiny_model.requires_grad_(False)
    with pytest.raises(ValueError, match="stage trains nothing"):
        create_optimizer(tiny_model, EVERYTHING)


def test_steps_are_those_of_muon_and_adamw_run_apart(tiny_model):
    other = copy.deepcopy(tiny_model)
    optimizer = create_optimizer(tiny_model, make_stage(model=1e-3, lm_head=1e-3, vision_head=1e-3))
    hidden = names_of(tiny_model, optimizer, muon=True)
    parameters = dict(other.named_parameters())
    muon = torch.optim.Muon(
        [parameters[name] for name in hidden], lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    matrices = {
        f"{name}.weight" for name, module in other.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    rest = [
        {"params": [p for name, p in parameters.items() if name not in hidden and (name in matrices) == decays],
         "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]  # fmt: skip
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95))
    for step in range(2):
        give_gradients(tiny_model, step)
        give_gradients(other, step)
        optimizer.step()
        muon.step()
        adamw.step()
    torch.testing.assert_close(tiny_model.state_dict(), other.state_dict())


def test_sharded_weights_take_adamw_alone(tiny_model):
    adamw_alone = make_stage(muon_scale=0.0, model=1e-3)
    optimizer = create_optimizer(tiny_model, adamw_alone)
    assert type(shardable(optimizer, adamw_alone)) is torch.optim.AdamW
    assert shardable(optimizer, adamw_alone).param_groups == optimizer.param_groups
    with pytest.raises(ValueError, match=r"stage: muon_scale=3.0, expected 0"):
        shardable(create_optimizer(tiny_model, EVERYTHING), EVERYTHING)


def test_a_loaded_optimizer_goes_on_exactly_as_the_saved_one(tiny_model):
    optimizer = create_optimizer(tiny_model, EVERYTHING)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    give_gradients(tiny_model, 0)
    optimizer.step()
    scheduler.step()
    other = copy.deepcopy(tiny_model)
    loaded = create_optimizer(other, EVERYTHING)
    loaded_scheduler = torch.optim.lr_scheduler.LambdaLR(loaded, lambda step: 1 / (step + 1))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded_scheduler.last_epoch = scheduler.last_epoch
    for step in (1, 2):
        for model, stepper, rates in ((tiny_model, optimizer, scheduler), (other, loaded, loaded_scheduler)):
            give_gradients(model, step)
            stepper.step()
            rates.step()
    assert [group["lr"] for group in loaded.param_groups] == [group["lr"] for group in optimizer.param_groups]
    torch.testing.assert_close(other.state_dict(), tiny_model.state_dict(), rtol=0, atol=0)


def test_a_scheduler_moves_the_rates_of_both_parts(tiny_model):
    optimizer = create_optimizer(tiny_model, EVERYTHING)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(tiny_model.state_dict())
    give_gradients(tiny_model, 0)
    optimizer.step()
    torch.testing.assert_close(tiny_model.state_dict(), before, rtol=0, atol=0)


def test_weight_decay_pulls_on_matrices_and_on_nothing_else(tiny_model):
    optimizer = create_optimizer(tiny_model, EVERYTHING)
    decay_of = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, parameter in tiny_model.named_parameters() if decay_of.get(parameter)}
    others = {name for name, parameter in tiny_model.named_parameters() if parameter in decay_of} - decayed
    assert set(decay_of.values()) == {0.0, 0.1}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in decayed
    assert not [name for name in decayed if name.endswith("bias") or "norm" in name or "embed_tokens" in name]
    assert all(tiny_model.get_parameter(name).ndim >= 2 for name in decayed)
    assert {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"} <= others
    assert [name for name in others if "scale_1" in name]  # layer scale
    assert [name for name in others if name.endswith("bias")]
