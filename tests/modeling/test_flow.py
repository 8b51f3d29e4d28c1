import math
from statistics import NormalDist

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import gaussian

from hydra_hf.modeling import HydraConfig
from hydra_hf.modeling.flow import (
    add_noise,
    euler_step,
    inference_sigmas,
    predict_clean,
    resolution_shift,
    sample_sigma,
    shift_sigma,
    velocity_from_clean,
    velocity_target,
)


CLEAN, NOISE = gaussian(3, 4, 2, 2, seed=0), gaussian(3, 4, 2, 2, seed=1)
SIGMA = torch.tensor([0.1, 0.5, 0.9])


@pytest.mark.parametrize("num_steps", [1, 10])
def test_true_velocity_carries_noise_back_to_the_data_through_the_scheduler(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=inference_sigmas(num_steps, shift=4.0).tolist())
    latents = NOISE
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity_target(CLEAN, NOISE), timestep, latents).prev_sample
    torch.testing.assert_close(latents, CLEAN, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 10])
def test_euler_step_takes_the_steps_of_the_scheduler(num_steps):
    sigmas = inference_sigmas(num_steps, shift=4.0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    ours = theirs = NOISE
    for index, timestep in enumerate(scheduler.timesteps):
        ours = euler_step(ours, ours.tanh(), sigmas[index], sigmas[index + 1])
        theirs = scheduler.step(theirs.tanh(), timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs)


def test_add_noise_is_the_schedulers_scale_noise():
    scheduler = FlowMatchEulerDiscreteScheduler()
    timesteps = scheduler.timesteps[[100, 500, 900]]
    theirs = scheduler.scale_noise(CLEAN, timesteps, NOISE)
    torch.testing.assert_close(add_noise(CLEAN, NOISE, timesteps / 1000), theirs)


def test_sigma_0_is_the_data_and_sigma_1_is_the_noise():
    assert torch.equal(add_noise(CLEAN, NOISE, torch.zeros(3)), CLEAN)
    assert torch.equal(add_noise(CLEAN, NOISE, torch.ones(3)), NOISE)


def test_every_sample_has_its_own_sigma():
    noisy = add_noise(CLEAN, NOISE, SIGMA)
    for index, sigma in enumerate(SIGMA):
        torch.testing.assert_close(noisy[index], (1 - sigma) * CLEAN[index] + sigma * NOISE[index])


def test_predict_clean_finds_the_data_behind_the_true_velocity():
    noisy = add_noise(CLEAN, NOISE, SIGMA)
    torch.testing.assert_close(predict_clean(noisy, velocity_target(CLEAN, NOISE), SIGMA), CLEAN)


def test_velocity_from_clean_inverts_predict_clean():
    noisy = add_noise(CLEAN, NOISE, SIGMA)
    velocity = gaussian(3, 4, 2, 2, seed=2)
    estimate = predict_clean(noisy, velocity, SIGMA)
    torch.testing.assert_close(velocity_from_clean(noisy, estimate, SIGMA), velocity, atol=1e-5, rtol=1e-5)


def test_velocity_from_clean_stays_bounded_where_sigma_is_0():
    velocity = velocity_from_clean(NOISE, CLEAN, torch.zeros(3), min_sigma=0.05)
    torch.testing.assert_close(velocity, (NOISE - CLEAN) / 0.05)


def test_shift_keeps_the_ends_and_moves_the_middle_towards_noise():
    torch.testing.assert_close(
        shift_sigma(torch.tensor([0.0, 0.5, 1.0]), shift=4.0), torch.tensor([0.0, 4 * 0.5 / (1 + 3 * 0.5), 1.0])
    )
    torch.testing.assert_close(shift_sigma(SIGMA, shift=1.0), SIGMA)


@pytest.mark.parametrize(
    ("num_tokens", "channels", "expected"), [(1024, 64, 4.0), (256, 64, 3.0), (4, 6, 3.0), (16_384, 64, 8.0)]
)
def test_resolution_shift_is_the_root_of_the_latent_size_between_3_and_8(num_tokens, channels, expected):
    assert resolution_shift(num_tokens * channels) == expected


def training_share_above(sigma: float, shift: float, logit_std: float) -> float:
    """How often a logit-normal level, shifted, is above `sigma`; in closed form."""
    unshifted = sigma / (shift - (shift - 1) * sigma)
    return 1 - NormalDist().cdf(math.log(unshifted / (1 - unshifted)) / logit_std)


@pytest.mark.parametrize("image_size", [256, 448, 896])
def test_the_samplers_first_steps_are_trained_for(image_size):
    """The first five of 50 steps, one in ten, are where an image's layout is decided; a spread of 1 hardly sees them."""
    config = HydraConfig.hydra_1_5b()
    tower = config.vision_config
    shift = resolution_shift((image_size // tower.patch_size) ** 2 * tower.latent_channels)
    first, second, *_, fifth = inference_sigmas(50, shift)[:5].tolist()
    share = {sigma: training_share_above(sigma, shift, config.sigma_logit_std) for sigma in (second, fifth)}
    assert first == 1
    assert share[second] > 0.005
    assert share[fifth] > 0.06
    assert training_share_above(fifth, shift, logit_std=1.0) < 0.01
    drawn = sample_sigma(
        20_000, shift=shift, logit_std=config.sigma_logit_std, generator=torch.Generator().manual_seed(0)
    )
    assert (drawn >= fifth).float().mean().item() == pytest.approx(share[fifth], rel=0.1)


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_inference_sigmas_are_the_schedulers_table(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=inference_sigmas(10).tolist())  # the scheduler shifts by itself
    torch.testing.assert_close(scheduler.sigmas[:-1], inference_sigmas(10, shift=shift))
    assert scheduler.sigmas[-1] == 0


def test_inference_sigmas_fall_from_1():
    sigmas = inference_sigmas(7, shift=3.0)
    assert sigmas[0] == 1
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] > 0


def test_sampled_sigmas_have_the_median_of_the_shifted_middle():
    sigmas = sample_sigma(20_000, shift=4.0, generator=torch.Generator().manual_seed(0))
    assert ((sigmas > 0) & (sigmas < 1)).all()
    assert math.isclose(sigmas.median(), 0.8, abs_tol=0.01)  # 4 * 0.5 / (1 + 3 * 0.5)


def test_sampled_sigmas_are_drawn_by_the_generator_alone():
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        draws.append(sample_sigma(8, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(*draws)


@pytest.mark.parametrize("num_steps", [0, -3])
def test_no_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={num_steps} must be at least 1"):
        inference_sigmas(num_steps)
