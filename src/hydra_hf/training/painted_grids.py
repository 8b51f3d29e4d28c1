"""Grids of what a model paints of held-out images while it is trained."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hydra_hf.data.tasks import TASKS
from hydra_hf.evaluation.maps import white_share
from hydra_hf.files import write_image_grid
from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.modeling.grid import image_starts, pack_images, unpack_images
from hydra_hf.modeling.image_processing_hydra import packed_pixel_values

from .callbacks import is_due
from .randomness import row_generator
from .recipe import HydraRecipe


NUM_IMAGES = 8  # of each task
Paint = Callable[
    [nn.Module, dict, str, torch.Generator], list[list[Tensor]]
]  # rows of images: given, expected, painted


class PaintedGrids(TrainerCallback):
    """A PNG for each task that paints one image from another: given, expected and painted images, a column for each sample.

    `white_share` of the painted boundaries is logged: 0 is the known collapse to black. On the main process, and not with
    sharded weights.
    """

    def __init__(self, trainer: Trainer, recipe: HydraRecipe, paint: Paint, output_dir: Path):
        self.trainer, self.recipe, self.paint, self.output_dir = trainer, recipe, paint, output_dir

    def on_step_end(self, args, state, control, **kwargs):
        due = is_due(state, args, self.recipe.sample_every)
        if not due or not state.is_world_process_zero or self.trainer.is_sharded:
            return
        bundle = self.trainer._prepare_inputs(self.trainer.held_out[0])
        for task in self.trainer.stage.tasks:
            if not (TASKS[task].generates and "image" in TASKS[task].user and "pixel_values" in bundle[task]):
                continue
            with torch.no_grad():
                generator = row_generator(self.recipe.seed, 1, 0)
                rows = self.paint(self.trainer.averaged_model.eval(), bundle, task, generator)
            path = self.output_dir / f"{task}-{state.global_step:06d}.png"
            write_image_grid(path, torch.stack(on_one_canvas([image for row in rows for image in row])), len(rows[0]))
            if task == "segment":
                shares = [white_share(image[None].float()).item() for image in rows[-1]]
                self.trainer.log({"held_out/segment/white_share": round(sum(shares) / len(shares), 5)})


def on_one_canvas(images: list[Tensor]) -> list[Tensor]:
    """Images (3, H, W) of several sizes, padded with black on the right and below to the size of the largest."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return [
        nn.functional.pad(image.float().cpu(), (0, width - image.shape[2], 0, height - image.shape[1]), value=-1.0)
        for image in images
    ]


def paint_hydra(
    model: HydraForConditionalGeneration, bundle: dict, task: str, generator: torch.Generator
) -> list[list[Tensor]]:
    """The rows of the grid, from samples that end with an image to be generated; the given image before it is shown.

    Each is painted alone: samples have sources of different sizes, and not all as many.
    """
    batch, patch_size = bundle[task], model.config.vision_config.patch_size
    images = unpack_images(packed_pixel_values(batch["pixel_values"]), batch["image_grid_thw"], patch_size)
    places = batch["is_generated"].nonzero().flatten().tolist()[:NUM_IMAGES]
    painted, first = [], 0
    for input_ids, place in zip(prompts_of(batch), places):
        pixel_values, _ = pack_images(images[first:place], patch_size)
        painted += model.generate_images(
            input_ids[None], torch.ones_like(input_ids)[None], pixel_values, batch["image_grid_thw"][first:place],
            height=images[place].shape[1], width=images[place].shape[2], num_inference_steps=24, guidance_scale=1.0,
            generator=generator, source_interaction=TASKS[task].links_source,
        )  # fmt: skip
        first = place + 1
    return [[images[place - 1] for place in places], [images[place] for place in places], painted]


def prompts_of(batch: dict[str, Tensor]) -> Iterator[Tensor]:
    """The ids (P,) of what precedes the last image in each sample."""
    starts = image_starts(batch["mm_token_type_ids"] > 0)
    for ids, mask, start in zip(batch["input_ids"], batch["attention_mask"], starts):
        end = int(start.nonzero()[-1])
        yield ids[:end][mask[:end].bool()]
