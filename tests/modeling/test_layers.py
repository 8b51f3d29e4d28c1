import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from tiny import gaussian, randomized
from torch import nn

from hydra_hf.modeling.grid import rotary_positions_2d
from hydra_hf.modeling.layers import (
    AdaLNZeroLayer,
    LayerScale,
    RMSNorm,
    TimestepEmbedding,
    ViTAttention,
    ViTLayer,
    ZeroLinear,
    apply_rotary,
    init_layer,
    scale_gradient,
)


def layer_config(attn_implementation: str = "sdpa", **changes) -> SimpleNamespace:
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 0.5,
        "attention_dropout": 0.0,
    }
    return SimpleNamespace(**{**sizes, **changes, "_attn_implementation": attn_implementation})


def initialized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.apply(lambda part: init_layer(part, 0.2))
    return module


def test_rotary_scores_depend_on_relative_positions_only():
    cos, sin = rotary_positions_2d([(1, 4, 5)], 8, like=torch.zeros(1))
    assert cos.shape == sin.shape == (20, 8)
    query, key = (gaussian(8, seed=seed).expand(1, 1, 20, 8) for seed in (0, 1))
    scores = apply_rotary(query, cos, sin) @ apply_rotary(key, cos, sin).transpose(2, 3)
    scores = scores.reshape(4, 5, 4, 5)
    torch.testing.assert_close(scores[0, 0, 2, 1], scores[1, 3, 3, 4])
    assert not torch.isclose(scores[0, 0, 2, 1], scores[0, 0, 1, 2])


def test_rotary_keeps_the_length_of_a_head():
    states = gaussian(1, 2, 6, 8)
    turned = apply_rotary(states, *rotary_positions_2d([(1, 2, 3)], 8, like=states))
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], states[:, :, 0])  # the origin does not turn


def test_timestep_embedding_reads_the_sinusoids_of_diffusers():
    embedding = initialized(TimestepEmbedding(16))
    embedding.linear_1, embedding.linear_2 = nn.Linear(256, 256), nn.Identity()
    nn.init.eye_(embedding.linear_1.weight), nn.init.zeros_(embedding.linear_1.bias)
    sigma = torch.tensor([0.0, 0.25, 1.0])
    theirs = get_timestep_embedding(1000 * sigma, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(embedding(sigma), nn.functional.silu(theirs))


def test_timestep_embedding_is_computed_in_fp32_under_bf16_weights():
    embedding = initialized(TimestepEmbedding(16))
    sigma = torch.tensor([0.5010, 0.5015])  # equal in bf16
    difference = embedding.bfloat16()(sigma).float().diff(dim=0).abs().amax()
    assert difference > 0.01


def test_adaln_zero_layer_is_the_identity_at_first_and_only_at_first():
    layer = initialized(AdaLNZeroLayer(layer_config())).eval()
    states, condition = gaussian(2, 6, 32, seed=0), gaussian(2, 1, 32, seed=1)
    rotary = rotary_positions_2d([(1, 2, 3)], 16, like=states)
    assert torch.equal(layer(states, condition, rotary), states)
    assert not torch.allclose(randomized(layer)(states, condition, rotary), states)


def test_adaln_zero_layer_learns_from_its_first_step():
    layer = initialized(AdaLNZeroLayer(layer_config()))
    states, condition = gaussian(2, 6, 32, seed=0), gaussian(2, 1, 32, seed=1)
    layer(states, condition, rotary_positions_2d([(1, 2, 3)], 16, like=states)).square().sum().backward()
    assert layer.modulation.weight.grad.abs().sum() > 0


def test_init_layer_sets_every_kind_of_layer():
    parts = [ZeroLinear(3, 3), nn.Linear(3, 3), nn.Conv2d(3, 3, 2), nn.LayerNorm(3), RMSNorm(3), LayerScale(3, 0.1)]
    for part in parts:
        for parameter in part.parameters():
            nn.init.constant_(parameter, torch.nan)
    zero, linear, conv, layer_norm, rms_norm, scale = map(initialized, parts)
    assert not zero.weight.any()
    assert not zero.bias.any()
    assert not linear.bias.any()
    assert not conv.bias.any()
    assert linear.weight.std() > 0
    assert conv.weight.std() > 0
    assert (layer_norm.weight == 1).all()
    assert (layer_norm.bias == 0).all()
    assert (rms_norm.weight == 1).all()
    assert (scale.weight == 0.1).all()


def rms_norms() -> tuple[RMSNorm, nn.RMSNorm]:
    """Ours and torch's with the same weight."""
    ours, theirs = RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)
    nn.init.normal_(ours.weight, mean=1.0, std=0.3, generator=torch.Generator().manual_seed(0))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_torchs_in_one_type(dtype):
    ours, theirs = (norm.to(dtype) for norm in rms_norms())
    states = gaussian(2, 6, 8).to(dtype)
    assert ours(states).dtype == dtype
    assert torch.equal(ours(states), theirs(states))


def test_rms_norm_mixes_no_types_under_autocast():
    ours, theirs = rms_norms()
    states = gaussian(2, 6, 8).bfloat16()
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch's warning comes once in a process
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
            warnings.simplefilter("error")
            normed = ours(states)
    finally:
        torch.set_warn_always(before)
    assert torch.equal(normed, theirs(states.float()).bfloat16())


IMPLEMENTATIONS = ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()  # flex attention has no gradient on a CPU
def test_every_attention_implementation_gives_the_eager_result(implementation, qk_norm):
    eager = initialized(ViTAttention(layer_config("eager"), qk_norm)).eval()
    other = ViTAttention(layer_config(implementation), qk_norm).eval()
    other.load_state_dict(eager.state_dict())
    states = gaussian(2, 6, 32)
    rotary = rotary_positions_2d([(1, 2, 3)], 16, like=states)
    torch.testing.assert_close(other(states, rotary)[0], eager(states, rotary)[0], atol=1e-5, rtol=1e-5)


def test_a_vit_layer_without_layer_scale_is_the_one_with_scale_1():
    scaled = initialized(ViTLayer(layer_config(layer_scale_init_value=1.0))).eval()
    plain = ViTLayer(layer_config(layer_scale_init_value=None)).eval()
    plain.load_state_dict({key: value for key, value in scaled.state_dict().items() if not key.startswith("scale_")})
    states = gaussian(2, 6, 32)
    assert torch.equal(plain(states), scaled(states))


def test_only_the_gradient_is_scaled():
    x = torch.randn(4, requires_grad=True, generator=torch.Generator().manual_seed(0))
    scaled = scale_gradient(x, 0.1)
    assert torch.equal(scaled, x)
    scaled.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4,), 0.1))
