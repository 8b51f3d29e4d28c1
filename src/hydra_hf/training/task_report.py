"""How long the samples of a task are: of its data, or nominal without data. A part of the dry run."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hydra_hf.data.tasks import TASKS
from hydra_hf.modeling import HydraConfig, HydraTokConfig, HydraVideoProcessor
from hydra_hf.modeling.grid import folded_length

from .hydra_trainer import create_bundles
from .recipe import HydraRecipe, HydraStage


NUM_SEEN = 16  # samples of each task that are read
NOMINAL_TEXT_TOKENS = 77  # text tokens of a sample when no data is read


@dataclass(frozen=True)
class TaskReport:
    """`length` is (min, mean, max); tokens and images are means over samples; `num_seen` is 0 for nominal lengths.

    Clips count as images, and `num_frames` is the mean of their latent frames.
    """

    num_samples: int
    num_seen: int
    length: tuple[float, float, float]
    image_tokens: float
    label_tokens: float
    num_images: float
    num_generated: float
    num_frames: float = 1.0
    flops: float = 0.0  # of all samples, forward and backward

    def __str__(self) -> str:
        low, mean, high = (round(length) for length in self.length)
        source = f"{self.num_seen} read" if self.num_seen else "nominal"
        return (
            f"{self.num_samples} samples ({source}) of {low} / {mean} / {high} tokens (min / mean / max),"
            f" {self.image_tokens:.0f} of images{' and clips' * (self.num_frames > 1)}, {self.label_tokens:.0f} with a text label; {self.flops:.3g} FLOPs"
        )


def look_at_tasks(recipe: HydraRecipe, stage: HydraStage) -> dict[str, TaskReport]:
    """A report on each task, from the first samples of the stage's data, or without data from nominal lengths."""
    if recipe.data_of(stage) is None:
        return {task: nominal_task(task, count, recipe.config, stage) for task, count in stage.tasks.items()}
    few = replace(stage, tasks={task: min(count, NUM_SEEN) for task, count in stage.tasks.items()})
    bundle = create_bundles(recipe, few, recipe.seed)[0]
    return {task: seen_task(bundle[task], count, recipe.config) for task, count in stage.tasks.items()}


def nominal_task(task: str, count: int, config: HydraConfig, stage: HydraStage) -> TaskReport:
    """The report on a task without data: 77 text tokens, labelled if text is scored, and the task's images, or clips of 17 frames,
    at the stage's size or the ViT's own."""
    row, vision = TASKS[task], config.vision_config
    num_images, num_frames, size = row.num_images, 1, stage.image_size
    if row.num_videos:
        num_images, size = row.num_videos, stage.clip_size
        num_frames = folded_length(HydraVideoProcessor.num_frames, vision.temporal_compression_ratio)
    num_patches = ((size or vision.image_size) // vision.patch_size) ** 2
    image_tokens = num_images * (config.num_time_tokens + num_frames * num_patches)
    length = NOMINAL_TEXT_TOKENS + image_tokens
    return TaskReport(
        num_samples=count, num_seen=0, length=(length, length, length), image_tokens=image_tokens, num_images=num_images,
        label_tokens=NOMINAL_TEXT_TOKENS if row.scores_text else int(row.generates), num_generated=float(row.generates),
        num_frames=num_frames,
    )  # fmt: skip


def seen_task(batch: dict[str, Tensor], count: int, config: HydraConfig) -> TaskReport:
    """The report on a task from one collated batch."""
    length = batch["attention_mask"].sum(dim=1).float()
    grids = batch["image_grid_thw"] if "image_grid_thw" in batch else torch.empty(0, 3)
    is_generated = batch["is_generated"] if len(grids) else torch.empty(0)
    num_frames = latent_frames(grids, config.vision_config)
    return TaskReport(
        num_samples=count,
        num_seen=len(length),
        length=(length.min().item(), length.mean().item(), length.max().item()),
        image_tokens=(batch["mm_token_type_ids"] > 0).sum().item() / len(length),
        label_tokens=(batch["labels"][:, 1:] != -100).sum().item() / len(length),
        num_images=len(grids) / len(length),
        num_generated=is_generated.sum().item() / len(length),
        num_frames=num_frames.mean().item() if len(grids) else 1.0,
    )


def latent_frames(image_grid_thw: Tensor, vision: HydraTokConfig) -> Tensor:
    """How many latent frames each image or clip has."""
    return 1 + (image_grid_thw[:, 0] - 1) / vision.temporal_compression_ratio
