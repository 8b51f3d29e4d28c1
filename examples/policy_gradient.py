"""A policy gradient on drawing, after Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): the embedded checkpoint learns to like a colour.

python examples/policy_gradient.py --out runs/policy_gradient

Each update draws a group of images for each of a few prompts with random steps, rewards every image, compares it with its group,
and makes the steps of the better ones likelier, by PPO's clipped ratio of their probabilities now and when they were drawn.
The reward is how red the image is, a stand-in for a judge: put any function of images and prompts in the place of `redness`.
Flow-GRPO also keeps the policy near its start by a KL term and samples in fewer steps than it draws in; this is its smallest form.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import hydra_hf
from hydra_hf import FlowMatchSDEScheduler, HydraPipeline
from hydra_hf.files import write_text
from hydra_hf.pipelines.policy import step_log_probs
from hydra_hf.toy.language import ToyLanguage
from hydra_hf.toy.world import ToyWorld


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """How much redder than green and blue images (B, 3, H, W) in [0, 1] are, (B,)."""
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    return red - (green + blue) / 2


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Each reward (B,) against the mean of its group, in units of the spread of all."""
    groups = rewards.unflatten(0, (-1, group_size))
    return ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std() + 1e-4)).flatten()


def ratios_of(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """How much likelier steps are than when they were drawn."""
    return (log_probs - old_log_probs).exp()


def clipped_loss(ratios: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's loss: a ratio outside 1 +- `clip_range` has no gradient that leads further out."""
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratios * advantages, clipped * advantages).mean()


def update(
    pipeline: HydraPipeline,
    optimizer: torch.optim.Optimizer,
    prompts: list[str],
    reward: Callable[[Tensor, list[str]], Tensor],
    generator: torch.Generator,
    *,
    group_size: int,
    num_inference_steps: int,
    num_epochs: int = 1,
    clip_range: float = 1e-3,
    output_type: str = "pt",
) -> dict[str, float]:
    """Draws, rewards, and trains on what was drawn; the mean reward, and the largest distance of a ratio from 1 in the first epoch.

    `output_type` is what the reward sees: "pt", images (B, 3, H, W) in [0, 1], or "latent".
    """
    output = pipeline(
        prompts, num_images_per_prompt=group_size, num_inference_steps=num_inference_steps, guidance_scale=1.0,
        generator=generator, output_type=output_type,
    )  # fmt: skip
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    rewards = reward(output.images.cpu(), repeated).to(output.latents.device)
    advantages, farthest = group_advantages(rewards, group_size), []
    for _ in range(num_epochs):
        for step in range(num_inference_steps):  # one at a time: the activations of a step are enough to keep
            log_probs = step_log_probs(pipeline, prompts, output.latents, steps=[step])
            ratios = ratios_of(log_probs[:, 0], output.log_probs[:, step])
            (clipped_loss(ratios, advantages, clip_range) / num_inference_steps).backward()
            farthest.append((ratios.detach() - 1).abs().max().item())
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"reward": rewards.mean().item(), "farthest_ratio": max(farthest[:num_inference_steps])}


def open_policy(model: str, noise_level: float, device: str = "cpu") -> HydraPipeline:
    """A pipeline with random steps, whose vision head can be trained and nothing else."""
    pipeline = HydraPipeline.from_pretrained(model).to(device)
    pipeline.scheduler = FlowMatchSDEScheduler.from_config(pipeline.scheduler.config, noise_level=noise_level)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.model.requires_grad_(False).vision_head.requires_grad_(True)
    return pipeline


def train(pipeline: HydraPipeline, options: argparse.Namespace) -> list[dict[str, float]]:
    """A row of numbers for each update."""
    optimizer = torch.optim.AdamW(pipeline.model.vision_head.parameters(), lr=options.learning_rate, weight_decay=0.0)
    language, generator = ToyLanguage(ToyWorld(1)), torch.Generator().manual_seed(options.seed)
    rows = []
    for number in range(options.num_updates):
        prompts, _ = language.sample_prompts(options.num_prompts, generator)
        texts = [prompt.text for prompt in prompts]
        row = update(
            pipeline, optimizer, texts, redness, generator, group_size=options.group_size,
            num_inference_steps=options.num_inference_steps, num_epochs=options.num_epochs,
            clip_range=options.clip_range,
        )  # fmt: skip
        rows.append({"update": number, **{name: round(value, 6) for name, value in row.items()}})
        print(rows[-1], flush=True)
    return rows


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=hydra_hf.TINY)
    parser.add_argument("--out", type=Path, default=Path("runs/policy_gradient"))
    parser.add_argument("--num_updates", type=int, default=20)
    parser.add_argument("--num_prompts", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=6)
    parser.add_argument("--num_epochs", type=int, default=1, help="updates from the same images")
    parser.add_argument("--noise_level", type=float, default=0.7)
    parser.add_argument("--clip_range", type=float, default=1e-3)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def main(options: argparse.Namespace) -> list[dict[str, float]]:
    pipeline = open_policy(options.model, options.noise_level, options.device)
    rows = train(pipeline, options)
    HydraPipeline.from_pretrained(options.model, model=pipeline.model).save_pretrained(options.out / "final")  # Euler
    write_text(options.out / "log.json", json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main(create_parser().parse_args())
