"""`examples/policy_gradient.py`: the ratio is 1 before the first update, and the reward rises."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import hydra_hf
from hydra_hf import FlowMatchSDEScheduler, HydraPipeline


PROMPTS = ["a cat", "a red circle"]


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "policy_gradient.py"
    spec = spec_from_file_location("policy_gradient", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def level(latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward that random weights can earn: the mean of the clean latents, whose pictures are all alike."""
    return latents.mean(dim=(1, 2, 3))


def policy_of(pipeline: HydraPipeline) -> HydraPipeline:
    pipeline.scheduler = FlowMatchSDEScheduler()
    pipeline.model.requires_grad_(False).vision_head.requires_grad_(True)
    return pipeline


def updated(example, pipeline: HydraPipeline, number: int, reward, learning_rate: float = 3e-3) -> list[dict]:
    optimizer = torch.optim.AdamW(pipeline.model.vision_head.parameters(), lr=learning_rate, weight_decay=0.0)
    options = {"group_size": 8, "num_inference_steps": 2, "output_type": "latent"}
    generator = seeded(0)
    return [example.update(pipeline, optimizer, PROMPTS, reward, generator, **options) for _ in range(number)]


def drawn(pipeline: HydraPipeline, **kwargs):
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "generator": seeded(1), "output_type": "latent"}
    return pipeline(PROMPTS * 8, **{**options, **kwargs})


def test_the_ratio_is_one_before_the_first_update_and_not_after_it(example, tiny_pipeline):
    pipeline = policy_of(tiny_pipeline)
    output = drawn(pipeline)
    (row,) = updated(example, pipeline, 1, level)
    assert row["farthest_ratio"] < 1e-5
    log_probs = example.step_log_probs(pipeline, PROMPTS * 8, output.latents).detach()
    assert (example.ratios_of(log_probs, output.log_probs) - 1).abs().max() > 1e-4


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_rewarded_becomes_more(example, tiny_pipeline, sign):
    pipeline = policy_of(tiny_pipeline)
    before = level(drawn(pipeline).images, PROMPTS)
    updated(example, pipeline, 4, lambda latents, prompts: sign * level(latents, prompts))
    after = level(drawn(pipeline).images, PROMPTS)
    assert sign * (after.mean() - before.mean()) > before.std()


def test_an_image_is_compared_with_its_own_group(example):
    advantages = example.group_advantages(torch.tensor([1.0, 3.0, 10.0, 12.0]), group_size=2)
    assert advantages[0] == advantages[2] == -advantages[1] == -advantages[3] < 0


def test_a_clipped_ratio_has_no_gradient_further_out(example):
    ratios = torch.tensor([1.2, 0.8, 1.2, 0.8], requires_grad=True)
    example.clipped_loss(ratios, torch.tensor([1.0, 1.0, -1.0, -1.0]), clip_range=0.1).backward()
    assert (ratios.grad != 0).tolist() == [False, True, True, False]


@pytest.mark.slow
def test_the_embedded_checkpoint_draws_redder_pictures(example, tmp_path):
    options = ["--out", str(tmp_path), "--num_updates", "8", "--num_prompts", "2", "--num_inference_steps", "4"]
    rows = example.main(example.create_parser().parse_args([*options, "--learning_rate", "3e-4"]))
    assert rows[0]["farthest_ratio"] < 1e-4
    trained, base = (
        drawn(HydraPipeline.from_pretrained(folder), output_type="pt", num_inference_steps=8).images
        for folder in (tmp_path / "final", hydra_hf.TINY)
    )
    assert example.redness(trained, PROMPTS).mean() > example.redness(base, PROMPTS).mean()
