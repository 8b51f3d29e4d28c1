"""What another model paints of held-out images while it is trained."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hydra_hf.data.tasks import TASKS
from hydra_hf.files import write_image_grid
from hydra_hf.training.callbacks import is_due
from hydra_hf.training.randomness import step_generator
from hydra_hf.training.recipe import UnifiedRecipe


NUM_IMAGES = 8  # of each task


class PaintedGrids(TrainerCallback):
    """A PNG for each task that generates: what is given, what is expected and what is painted, a column for each sample;
    on the main process, not from sharded weights."""

    def __init__(self, trainer: Trainer, recipe: UnifiedRecipe, output_dir: Path):
        self.trainer, self.recipe, self.output_dir = trainer, recipe, output_dir

    def on_step_end(self, args, state, control, **kwargs):
        due = is_due(state, args, self.recipe.sample_every)
        if not due or not state.is_world_process_zero or self.trainer.is_sharded:
            return
        for task in self.trainer.stage.tasks:
            if TASKS[task].generates:
                rows = self.paint(task)
                path = self.output_dir / f"{task}-{state.global_step:06d}.png"
                write_image_grid(path, torch.cat(rows), num_columns=len(rows[0]))

    @torch.no_grad()
    def paint(self, task: str) -> list[Tensor]:
        """The rows of the grid, each (n, 3, H, W)."""
        trainer, model = self.trainer, self.trainer.averaged_model.eval()
        inputs = trainer.objective.prepare(model, trainer._prepare_inputs(trainer.held_out[0]), task)
        inputs.pop("generators")
        target = inputs.pop("target_pixel_values")[:NUM_IMAGES]
        inputs = {name: value[:NUM_IMAGES] for name, value in inputs.items()}
        painted = model.generate_images(
            **inputs, guidance_scale=self.recipe.guidance_scale, generator=step_generator(self.recipe.seed, 1)
        )
        given = [inputs["pixel_values"]] if "pixel_values" in inputs else []
        return [*given, target, painted.to(target.dtype)]
