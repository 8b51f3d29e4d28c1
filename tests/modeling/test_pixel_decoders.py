import inspect

import pytest
import torch
from tiny import flow_decoder_config, gaussian, randomized, tok_model
from torch import nn

from hydra_hf import HydraTokConfig, PixelViTDecoderConfig
from hydra_hf.modeling.flow import add_noise, predict_clean
from hydra_hf.modeling.layers import init_layer
from hydra_hf.modeling.pixel_decoders import PixelFlowDecoder, PixelViTDecoder


GRIDS, PATCH_VALUES = [(1, 2, 3)], 3 * 4 * 4
STATES = gaussian(2, 6, 16, seed=0)
NOISE = gaussian(2, 6, PATCH_VALUES, seed=1)


def vit_decoder_config(**changes) -> PixelViTDecoderConfig:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 4,
    }
    return PixelViTDecoderConfig(**{**sizes, **changes})


def initialized(decoder: nn.Module) -> nn.Module:
    decoder.config._attn_implementation = "sdpa"
    with torch.no_grad():
        decoder.apply(lambda part: init_layer(part, 0.2))
    return decoder.eval()


def flow_decoder(**changes) -> PixelFlowDecoder:
    torch.manual_seed(0)
    return initialized(PixelFlowDecoder(flow_decoder_config(**changes)))


def vit_decoder() -> PixelViTDecoder:
    torch.manual_seed(0)
    return initialized(PixelViTDecoder(vit_decoder_config()))


class PerfectDecoder(PixelFlowDecoder):
    """Knows the data, so that its velocity is the true one: what remains is the sampler."""

    def forward(self, noisy_patches, sigma, conditions):
        return (noisy_patches - self.clean) / sigma[:, None, None]


@pytest.mark.parametrize(("size", "expected"), [("S", 144_257_612), ("M", 240_847_436), ("L", 358_437_452)])
def test_the_flow_decoder_has_the_parameters_of_the_paper(size, expected):
    with torch.device("meta"):
        decoder = PixelFlowDecoder(HydraTokConfig.internvit_300m(size).decoder_config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == expected


def test_a_fresh_flow_decoder_predicts_zero():
    """Zero velocity, and by default zero pixels: the noise is all that it wants to lose."""
    assert not flow_decoder().decode(STATES, GRIDS, noise=NOISE, num_inference_steps=1).any()
    decoder = flow_decoder(prediction_type="velocity")
    sigma = torch.tensor([0.3, 1.0])
    assert not decoder(NOISE, sigma, decoder.get_conditions(STATES, GRIDS)).any()
    assert torch.equal(decoder.decode(STATES, GRIDS, noise=NOISE), NOISE)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_a_perfect_velocity_decodes_to_the_data(num_steps):
    decoder = initialized(PerfectDecoder(flow_decoder_config()))
    decoder.clean = gaussian(2, 6, PATCH_VALUES, seed=2)
    patches = decoder.decode(STATES, GRIDS, noise=NOISE, num_inference_steps=num_steps)
    torch.testing.assert_close(patches, decoder.clean, atol=1e-5, rtol=0)


def test_the_number_of_steps_comes_from_the_config_when_none_is_named():
    decoder = randomized(flow_decoder(num_inference_steps=3))
    default = decoder.decode(STATES, GRIDS, noise=NOISE)
    assert torch.equal(default, decoder.decode(STATES, GRIDS, noise=NOISE, num_inference_steps=3))
    assert not torch.allclose(default, decoder.decode(STATES, GRIDS, noise=NOISE, num_inference_steps=1))


def test_noise_of_one_patch_does_not_reach_another_patch():
    decoder = randomized(flow_decoder())
    noise = NOISE.clone()
    noise[:, 2] += 1
    before, after = (decoder.decode(STATES, GRIDS, noise=x, num_inference_steps=2) for x in (NOISE, noise))
    changed = (before - after).abs().amax(dim=(0, 2)) > 0
    assert changed.tolist() == [False, False, True, False, False, False]


def test_the_condition_of_one_patch_reaches_every_patch():
    decoder = randomized(flow_decoder())
    states = STATES.clone()
    states[:, 2] += gaussian(16, seed=3)  # not a constant, which the norms would take away
    before, after = (decoder.decode(x, GRIDS, noise=NOISE) for x in (STATES, states))
    assert ((before - after).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_a_sample_prediction_is_read_as_the_clean_pixels():
    sample = randomized(flow_decoder(prediction_type="sample"))
    velocity = PixelFlowDecoder(flow_decoder_config(prediction_type="velocity")).eval()
    velocity.config._attn_implementation = "sdpa"
    velocity.load_state_dict(sample.state_dict())
    sigma = torch.tensor([0.4, 1.0])
    noisy = add_noise(torch.zeros_like(NOISE), NOISE, sigma)
    conditions = sample.get_conditions(STATES, GRIDS)
    estimate = predict_clean(noisy, sample(noisy, sigma, conditions), sigma)
    torch.testing.assert_close(estimate, velocity(noisy, sigma, conditions), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_the_velocity_is_fp32_under_bf16_weights(prediction_type):
    decoder = randomized(flow_decoder(prediction_type=prediction_type)).bfloat16()
    patches = decoder.decode(STATES.bfloat16(), GRIDS, noise=NOISE, num_inference_steps=2)
    assert patches.dtype == torch.float32
    assert torch.isfinite(patches).all()


def test_the_vit_decoder_ignores_noise():
    decoder = vit_decoder()
    patches = decoder.decode(STATES, GRIDS, noise=None)
    assert patches.shape == NOISE.shape
    assert torch.equal(decoder.decode(STATES, GRIDS, noise=NOISE, num_inference_steps=1), patches)


def test_the_vit_decoder_refuses_steps_it_cannot_take():
    with pytest.raises(ValueError, match="num_inference_steps=4.*one step"):
        vit_decoder().decode(STATES, GRIDS, num_inference_steps=4)


def test_both_decoders_answer_the_same_call():
    names = [list(inspect.signature(cls.decode).parameters) for cls in (PixelFlowDecoder, PixelViTDecoder)]
    assert names[0] == names[1]
    vit_model = tok_model(decoder_config=vit_decoder_config())
    for model in (tok_model(), vit_model):
        sample = model.decode(gaussian(2, 6, 2, 3), generator=torch.Generator().manual_seed(0)).sample
        assert sample.shape == (2, 3, 8, 12)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps=-1"):
        flow_decoder().decode(STATES, GRIDS, noise=NOISE, num_inference_steps=-1)
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        flow_decoder().decode(STATES, GRIDS, noise=NOISE, num_inference_steps=0)
