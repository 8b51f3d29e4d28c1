"""Drawing as a policy: random steps, their probabilities, and what a policy gradient makes of them."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hydra_hf import FlowMatchSDEScheduler, HydraPipeline
from hydra_hf.modeling.flow import euler_step, inference_sigmas, sde_step
from hydra_hf.pipelines.policy import step_log_probs


PROMPTS = ["a cat", "a red circle and two blue squares"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def policy(tiny_pipeline) -> HydraPipeline:
    tiny_pipeline.scheduler = FlowMatchSDEScheduler.from_config(tiny_pipeline.scheduler.config)
    return tiny_pipeline


def drawn(pipeline: HydraPipeline, prompt=PROMPTS, **kwargs):
    options = {"guidance_scale": 1.0, "generator": seeded(), "output_type": "pt", **kwargs}
    return pipeline(prompt, **options)


# The steps


def test_without_noise_the_mean_is_the_step_of_euler():
    noisy, velocity = torch.randn(2, 3, 4, 4, generator=seeded()).split(1)
    mean, std = sde_step(noisy, velocity, 0.6, 0.4, 0.0)
    torch.testing.assert_close(mean, euler_step(noisy, velocity, 0.6, 0.4))
    assert std == 0


def test_random_steps_end_in_the_distribution_of_the_data():
    """Normal data of mean 2 and spread 0.5, whose velocity is known: E[noise - data | x]."""
    data_mean, data_std, num_steps = 2.0, 0.5, 200
    sigmas = [*inference_sigmas(num_steps).tolist(), 0.0]
    scheduler = FlowMatchSDEScheduler(noise_level=0.7)
    scheduler.set_timesteps(sigmas=sigmas[:-1])
    generator, samples = seeded(), torch.randn(20_000, 1, generator=seeded(1))
    for timestep, sigma in zip(scheduler.timesteps, sigmas):
        variance = (1 - sigma) ** 2 * data_std**2 + sigma**2
        surprise = (samples - (1 - sigma) * data_mean) / variance
        velocity = sigma * surprise - (data_mean + (1 - sigma) * data_std**2 * surprise)
        samples = scheduler.step(velocity, timestep, samples, generator=generator).prev_sample
    assert samples.mean().item() == pytest.approx(data_mean, abs=0.02)
    assert samples.std().item() == pytest.approx(data_std, abs=0.02)


def test_the_noise_of_a_step_is_that_of_flow_grpo():
    scheduler = FlowMatchSDEScheduler(noise_level=0.5)
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.4])
    sample, velocity = torch.randn(2, 1, 3, 2, 2, generator=seeded()).unbind(0)
    for index, (sigma, next_sigma, finite) in enumerate([(1.0, 0.8, 0.8), (0.8, 0.4, 0.8), (0.4, 0.0, 0.4)]):
        normal = scheduler.distribution(velocity, sample, index)
        rate, dt = 0.5 * math.sqrt(sigma / (1 - finite)), next_sigma - sigma
        expected = (
            sample * (1 + rate**2 / (2 * sigma) * dt) + velocity * (1 + rate**2 * (1 - sigma) / (2 * sigma)) * dt
        )  # the form of its code
        torch.testing.assert_close(normal.mean, expected)
        torch.testing.assert_close(normal.stddev, torch.full_like(sample, rate * math.sqrt(-dt)))


def test_a_scheduler_is_saved_and_opened_in_its_pipeline(policy, tmp_path):
    policy.scheduler = FlowMatchSDEScheduler(noise_level=0.3)
    policy.save_pretrained(tmp_path)
    opened = HydraPipeline.from_pretrained(tmp_path)
    assert isinstance(opened.scheduler, FlowMatchSDEScheduler)
    assert opened.scheduler.config.noise_level == 0.3
    back = FlowMatchEulerDiscreteScheduler.from_config(opened.scheduler.config)
    assert back.config.stochastic_sampling is False


@pytest.mark.parametrize("noise_level", [0, -1, "much", float("nan")])
def test_steps_without_noise_are_refused(noise_level):
    with pytest.raises(ValueError, match="noise_level"):
        FlowMatchSDEScheduler(noise_level=noise_level)


# The pipeline


def test_the_output_has_every_step(policy):
    output = drawn(policy, num_images_per_prompt=2, num_inference_steps=3)
    assert output.latents.shape == (4, 4, 4, 4, 4)  # images, steps + 1, channels, h, w
    assert output.log_probs.shape == (4, 3)
    clean = drawn(policy, num_images_per_prompt=2, num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(output.latents[:, -1], clean)
    noise = policy.prepare_latents(4, policy.get_grid(None, None), seeded())
    torch.testing.assert_close(output.latents[:, 0], noise)


def test_steps_of_euler_have_no_probabilities(tiny_pipeline):
    output = drawn(tiny_pipeline)
    assert output.latents is output.log_probs is None
    assert len(drawn(tiny_pipeline, return_dict=False)) == 1


def test_an_image_does_not_depend_on_the_others_of_its_batch(policy):
    together = drawn(policy, generator=[seeded(1), seeded(2)])
    alone = drawn(policy, PROMPTS[1], generator=[seeded(2)])
    torch.testing.assert_close(together.latents[1:], alone.latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "guidance", [{}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "negative_prompt": "a dog"}]
)
def test_recomputed_log_probs_are_those_of_sampling(policy, guidance):
    output = drawn(policy, num_images_per_prompt=2, **guidance)
    log_probs = step_log_probs(policy, PROMPTS, output.latents, **guidance)
    torch.testing.assert_close(log_probs, output.log_probs, atol=1e-5, rtol=1e-5)
    chosen = step_log_probs(policy, PROMPTS, output.latents, steps=[2, 0], **guidance)
    torch.testing.assert_close(chosen, log_probs[:, [2, 0]])


def test_log_probs_of_clips_are_those_of_sampling(clip_pipeline):
    euler = clip_pipeline.scheduler
    try:
        clip_pipeline.scheduler = FlowMatchSDEScheduler()
        output = drawn(clip_pipeline, num_frames=5, height=16, width=16)
        assert output.latents.ndim == 6
        log_probs = step_log_probs(clip_pipeline, PROMPTS, output.latents)
        torch.testing.assert_close(log_probs, output.log_probs, atol=1e-5, rtol=1e-5)
    finally:
        clip_pipeline.scheduler = euler


def test_log_probs_are_log_densities_of_the_recorded_steps(policy):
    output = drawn(policy, PROMPTS[0])
    sigmas = policy.scheduler.sigmas
    prefix = policy.prepare_prefix([PROMPTS[0]], policy.get_grid(None, None))
    branches = policy.get_branches([prefix], is_guided=False)
    with torch.no_grad():
        velocity = policy.model.denoise_step(output.latents[:, 1], sigmas[1:2], branches)
    normal = policy.scheduler.distribution(velocity, output.latents[:, 1], 1)
    density = torch.distributions.Independent(normal, 3).log_prob(output.latents[:, 2])
    torch.testing.assert_close(output.log_probs[:, 1], density / output.latents[0, 0].numel(), atol=1e-5, rtol=1e-5)


def test_gradients_reach_prompts_and_head(policy):
    output = drawn(policy)
    step_log_probs(policy, PROMPTS, output.latents, steps=[1]).sum().backward()
    embeddings = policy.model.get_input_embeddings().weight.grad
    words = policy.processor.tokenizer("cat", add_special_tokens=False).input_ids
    assert embeddings[words].abs().sum() > 0
    assert policy.model.vision_head.out_proj.weight.grad.abs().sum() > 0


def test_a_callback_must_not_change_recorded_latents(policy):
    def change(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] + 1}

    with pytest.raises(ValueError, match="callback"):
        drawn(policy, callback_on_step_end=change)


def test_wrong_arguments_are_refused(policy, tiny_pipeline):
    latents = drawn(policy).latents
    with pytest.raises(ValueError, match="2 prompts"):
        step_log_probs(policy, PROMPTS, latents[:1])
    with pytest.raises(ValueError, match="steps"):
        step_log_probs(policy, PROMPTS, latents[:, 0])
    with pytest.raises(ValueError, match="negative"):
        step_log_probs(policy, PROMPTS, latents, negative_prompt=["a dog"], guidance_scale=2.0)
    tiny_pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchSDEScheduler"):
        step_log_probs(tiny_pipeline, PROMPTS, latents)
