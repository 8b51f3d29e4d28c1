"""`examples/vae_in_dit.py`: HYDRA-TOK as the VAE of diffusers' transformers."""

import sys
from argparse import Namespace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler

from hydra_hf import HydraTokModel
from hydra_hf.modeling.flow import add_noise, velocity_target
from toy_models import toy_language, toy_pipeline


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("vae_in_dit", Path(__file__).parents[1] / "examples" / "vae_in_dit.py")
    module = sys.modules["vae_in_dit"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_task(script):
    """A function that makes a task of the script with a random tokenizer and language model."""

    def make(name: str):
        torch.manual_seed(0)
        hydra = toy_pipeline()
        hydra.model.requires_grad_(False)
        return script.TASKS[name](hydra, toy_language(), script.create_scheduler(shift=3.0))

    return make


OPTIONS = Namespace(seed=0, num_images=8, batch_size=4, num_steps=2, learning_rate=1e-3, log_every=100, num_prompts=4,
                    num_inference_steps=2, guidance_scale=2.0)  # fmt: skip


@pytest.mark.parametrize("name", ["dit", "sana"])
def test_training_changes_the_transformer_alone_and_diffusers_draws_with_it(script, make_task, name):
    task = make_task(name)
    before = {
        part: [value.clone() for value in getattr(task.pipeline, part).parameters()] for part in ("vae", "transformer")
    }
    script.train(task, 3.0, OPTIONS)
    changed = {
        part: any(not torch.equal(old, new) for old, new in zip(values, getattr(task.pipeline, part).parameters()))
        for part, values in before.items()
    }
    assert changed == {"vae": False, "transformer": True}
    scores, drawn = script.score(task, toy_language().world, OPTIONS)
    assert drawn.shape == (4, 3, 64, 64)
    assert {"drawn/all", "rebuilt/all"} <= set(scores)
    assert all(0 <= value <= 1 for value in scores.values())


@pytest.mark.parametrize("name", ["dit", "sana"])
def test_a_saved_pipeline_draws_the_same_picture(script, make_task, name, tmp_path):
    task = make_task(name)
    task.pipeline.transformer.requires_grad_(False)
    for parameter in task.pipeline.transformer.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape))  # zero-initialised layers, too
    _, prompts = task.sample(2, "test", torch.Generator().manual_seed(0))
    task.pipeline.save_pretrained(tmp_path)
    pictures = []
    for pipeline in (
        task.pipeline,
        {"dit": DiTPipeline, "sana": script.HydraSanaPipeline}[name].from_pretrained(tmp_path),
    ):
        assert isinstance(pipeline.vae, HydraTokModel)
        task.pipeline = pipeline
        torch.manual_seed(0)  # DiTPipeline passes no generator to the decoder
        pictures.append(task.draw(prompts, num_inference_steps=2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*pictures)
    assert pictures[0].std() > 0.01


def test_the_scheduler_of_diffusers_steps_along_the_velocity_that_is_learnt(script):
    """With the true velocity, the sampler comes back to the data from pure noise."""
    scheduler = script.create_scheduler(shift=3.0)
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 2, 2, generator=generator)
    sigma = scheduler.timesteps[:1] / 1000
    latents = add_noise(clean, noise, sigma)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity_target(clean, noise), timestep, latents).prev_sample
    torch.testing.assert_close(latents, clean, rtol=0, atol=5e-3)


def test_held_out_pairs_and_counts_are_not_trained_on(make_task):
    task = make_task("sana")
    trained, held_out = (
        {
            prompt.text
            for prompt in task.sample(300, split, torch.Generator().manual_seed(0))[1]
            if prompt.category not in ("single_object", "colors")
        }
        for split in ("train", "test")
    )
    assert len(held_out) > 20
    assert not trained & held_out
