import pytest
import torch
from tiny import gaussian, tok_config, tok_model
from torch.distributions import Normal

from hydra_hf.modeling.bottleneck import Bottleneck, sample_posterior


def test_sem_vit_reads_the_mean_and_nothing_of_the_variance():
    bottleneck = Bottleneck(tok_config()).eval()
    states = gaussian(2, 4, 24)
    before = bottleneck(states)
    with torch.no_grad():
        bottleneck.down_proj.bias[6:] += 3.0  # rho
    after = bottleneck(states)
    assert not torch.equal(after.logvar, before.logvar)
    assert torch.equal(after.mean, before.mean)
    assert torch.equal(after.hidden_states, before.hidden_states)
    torch.testing.assert_close(before.hidden_states, bottleneck.semantic_up_proj(before.mean))


def test_posterior_samples_have_the_mean_and_variance_of_the_bottleneck():
    mean, logvar = gaussian(1, 2, 3, seed=0), gaussian(1, 2, 3, seed=1)
    samples = sample_posterior(mean, logvar, gaussian(40_000, 2, 3, seed=2))
    posterior = Normal(mean, (0.5 * logvar).exp())
    torch.testing.assert_close(samples.mean(0), posterior.mean[0], atol=0.05, rtol=0.05)
    torch.testing.assert_close(samples.var(0), posterior.variance[0], atol=0.05, rtol=0.05)


def test_zero_noise_gives_the_mean():
    mean, logvar = gaussian(1, 2, 3, seed=0), gaussian(1, 2, 3, seed=1)
    assert torch.equal(sample_posterior(mean, logvar, torch.zeros(1, 2, 3)), mean)


def test_an_absurd_logvar_stays_finite():
    bottleneck = Bottleneck(tok_config())
    with torch.no_grad():
        bottleneck.down_proj.bias[6:9], bottleneck.down_proj.bias[9:] = 1e4, -1e4
    logvar = bottleneck(gaussian(1, 4, 24)).logvar
    assert torch.isfinite(logvar.exp()).all()
    assert (logvar[..., :3] == 20).all()
    assert (logvar[..., 3:] == -30).all()


def test_denormalize_undoes_normalize():
    bottleneck = Bottleneck(tok_config())
    bottleneck.latents_mean.copy_(gaussian(6, seed=0))
    bottleneck.latents_std.copy_(gaussian(6, seed=1).exp())
    tokens = gaussian(2, 4, 6, seed=2)
    assert not torch.allclose(bottleneck.normalize(tokens), tokens)
    torch.testing.assert_close(bottleneck.denormalize(bottleneck.normalize(tokens)), tokens)


def test_statistics_are_the_identity_until_they_are_set():
    tokens = gaussian(2, 4, 6)
    assert torch.equal(tok_model().bottleneck.normalize(tokens), tokens)


@pytest.mark.parametrize(("decoder", "width"), [(True, 16), (False, 24)])
def test_each_reader_of_the_latents_has_its_own_unprojection(decoder, width):
    config = tok_config() if decoder else tok_config(decoder_config=None)
    bottleneck = Bottleneck(config)
    assert bottleneck.semantic_up_proj.out_features == 24
    assert bottleneck.decoder_up_proj.out_features == width
    assert "latents_mean" in bottleneck.state_dict()
    assert "latents_std" in bottleneck.state_dict()
