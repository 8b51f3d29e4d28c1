import pytest
import torch
from torch.distributions import Normal, kl_divergence

from hydra_hf.modeling import HydraTokForPreTraining, PixelViTDecoderConfig
from hydra_hf.training.losses import cosine_loss, kl_loss, tokenizer_losses, weighted_sum
from hydra_hf.training.recipe import HydraLossWeights, TokenizerLossWeights


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_kl_is_that_of_torch_distributions_summed_over_channels():
    mean, logvar = gaussian(2, 5, 4), gaussian(2, 5, 4, seed=1)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(-1).mean()
    torch.testing.assert_close(kl_loss(mean, logvar), expected)


def test_kl_of_a_standard_normal_is_zero():
    assert kl_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)) == 0


def test_half_precision_does_not_overflow_kl():
    logvar = torch.full((1, 1, 1), 18.0, dtype=torch.float16)  # e^18 is beyond fp16
    assert kl_loss(torch.zeros_like(logvar), logvar).isfinite()


@pytest.mark.parametrize(("factor", "expected"), [(3.0, 0.0), (-2.0, 2.0)])
def test_cosine_loss_knows_directions_and_not_lengths(factor, expected):
    states = gaussian(2, 3, 8)
    torch.testing.assert_close(cosine_loss(states, factor * states), torch.tensor(expected))


def test_cosine_loss_of_orthogonal_states_is_one():
    assert cosine_loss(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])) == 1


def test_weighted_sum_takes_exactly_the_losses_that_are_there():
    weights = TokenizerLossWeights(kl=2.0, cosine=0.5, flow=100.0, regression=100.0)
    losses = {"kl": torch.tensor(3.0), "cosine": torch.tensor(4.0)}
    assert weighted_sum(losses, weights) == 2.0 * 3.0 + 0.5 * 4.0


def test_weighted_sum_refuses_a_loss_without_a_weight():
    with pytest.raises(AttributeError, match="kl"):
        weighted_sum({"kl": torch.tensor(1.0)}, HydraLossWeights())


def tokenizer_outputs(config):
    torch.manual_seed(0)
    model, pixel_values = HydraTokForPreTraining(config), gaussian(2, 3, 32, 32).clamp(-1, 1)
    noise = {
        "latent_noise": gaussian(2, 16, 4),
        "pixel_noise": gaussian(2, 16, 192),
        "sigma": torch.tensor([0.2, 1.0]),
    }
    return model(pixel_values, **noise), pixel_values


def test_a_flow_decoder_is_trained_by_its_velocity(tiny_tok_config):
    outputs, pixel_values = tokenizer_outputs(tiny_tok_config)
    losses = tokenizer_losses(outputs, pixel_values, TokenizerLossWeights())
    assert set(losses) == {"kl", "cosine", "flow"}
    torch.testing.assert_close(losses["flow"], ((outputs.velocity - outputs.velocity_target) ** 2).mean())


def test_a_vit_decoder_is_trained_by_its_pixels(tiny_tok_config):
    decoder = PixelViTDecoderConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, patch_size=8
    )
    config = type(tiny_tok_config).from_dict({**tiny_tok_config.to_dict(), "decoder_config": decoder.to_dict()})
    outputs, pixel_values = tokenizer_outputs(config)
    losses = tokenizer_losses(outputs, pixel_values, TokenizerLossWeights())
    assert set(losses) == {"kl", "cosine", "regression"}
    error = outputs.clean_pixel_values - pixel_values
    torch.testing.assert_close(losses["regression"], (error**2 + error.abs() / 2).mean())


def test_the_cosine_loss_does_not_pull_the_encoder_towards_the_bottleneck(tiny_tok_config):
    outputs, pixel_values = tokenizer_outputs(tiny_tok_config)
    outputs.gen_states.retain_grad()
    outputs.bottleneck_states = outputs.bottleneck_states.detach().requires_grad_()
    tokenizer_losses(outputs, pixel_values, TokenizerLossWeights())["cosine"].backward()
    assert outputs.gen_states.grad is None
    assert outputs.bottleneck_states.grad.abs().sum() > 0
