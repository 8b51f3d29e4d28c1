"""Drawing as a policy: the log-probabilities of steps under the model as it is now. Flow-GRPO (arXiv 2505.05470)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..modeling.image_generation import GuidanceBranch, classifier_free
from .arguments import check_texts
from .pipeline_hydra import HydraPipeline
from .scheduling_flow_match_sde import FlowMatchSDEScheduler


def step_log_probs(
    pipeline: HydraPipeline,
    prompt: str | list[str],
    latents: Tensor,
    *,
    negative_prompt: str | list[str] = "",
    guidance_scale: float = 1.0,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Log-probabilities (B, number of steps) of the steps of an earlier call of the pipeline, with gradients.

    Before the weights change they are the call's `log_probs`. The branches of guidance are part of the policy; the arguments are to be
    those of the call, which may have had no `image`, `guidance_interval` or `guidance_rescale`.

    Args:
        latents: those of the call's output, (B, steps + 1, C, [T',] h, w), or some of its images with their prompts.
        steps: numbers of the steps to recompute, each of which keeps its activations until the backward pass; None is all.

    Raises ValueError for a pipeline without a `FlowMatchSDEScheduler`, and for latents or negative prompts that do not fit the prompts.
    """
    scheduler, prompts = pipeline.scheduler, check_texts("prompt", prompt)
    if not isinstance(scheduler, FlowMatchSDEScheduler):
        raise ValueError(f"Got a {type(scheduler).__name__} as scheduler, expected a FlowMatchSDEScheduler.")
    if latents.ndim not in (5, 6) or latents.shape[1] < 2 or len(latents) % len(prompts):
        raise ValueError(
            f"Got latents {tuple(latents.shape)} for {len(prompts)} prompts, expected (B, steps + 1, C, [T',] h, w) with as"
            " many images for each prompt."
        )
    negative_prompts = check_texts("negative_prompt", negative_prompt)
    if isinstance(negative_prompt, str):
        negative_prompts = negative_prompts * len(prompts)
    if len(negative_prompts) != len(prompts):
        raise ValueError(f"Got {len(negative_prompts)} negative prompts for {len(prompts)} prompts, expected as many.")
    branches = _branches(pipeline, prompts, negative_prompts, guidance_scale, latents)
    num_steps = latents.shape[1] - 1
    sigmas = pipeline.prepare_sigmas(num_steps, _grid(latents))
    log_probs = []
    for index in range(num_steps) if steps is None else steps:
        sample, prev_sample = latents[:, index], latents[:, index + 1]
        velocity = pipeline.model.denoise_step(sample, sample.new_full((len(sample),), sigmas[index]), branches)
        log_probs.append(scheduler.log_prob(velocity, sample, prev_sample, index))
    return torch.stack(log_probs, dim=1)


def _branches(
    pipeline: HydraPipeline, prompts: list[str], negative_prompts: list[str], guidance_scale: float, latents: Tensor
) -> list[GuidanceBranch]:
    def prefill(texts: list[str]):
        prefix = pipeline.model.prefill(**pipeline.encode_prompts(texts, _grid(latents)))
        return prefix.repeat_interleave(len(latents) // len(texts))

    if guidance_scale <= 1:
        return [GuidanceBranch(prefill(prompts))]
    return classifier_free(prefill(prompts), prefill(negative_prompts), guidance_scale)


def _grid(latents: Tensor) -> tuple[int, int, int]:
    """The grid of latents (B, steps + 1, C, [T',] h, w)."""
    return (1, *latents.shape[3:])[-3:]
