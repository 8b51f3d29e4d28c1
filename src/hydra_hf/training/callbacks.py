"""What happens between training steps on bundles: the average, the log, held-out losses, images, stopping."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hydra_hf.files import write_image_grid, write_text
from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from .processes import gather_shares, share_of
from .randomness import row_generator
from .recipe import HydraRecipe


class LossHistory:
    """Sums of losses and of skipped records since the last log, kept on their device: reading them would wait for it."""

    def __init__(self, names: list[str]):
        self.names = names
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor | float] = dict.fromkeys(self.names, 0.0)
        self.num_steps: dict[str, Tensor | float] = dict.fromkeys(self.names, 0.0)  # in which a loss had a target
        self.num_skipped = 0

    def count(self, has_target: dict[str, Tensor], num_skipped: int) -> None:
        """Call once in an optimizer step."""
        for name in self.names:
            self.num_steps[name] = self.num_steps[name] + has_target[name]
        self.num_skipped += num_skipped

    def add(self, losses: dict[str, Tensor]) -> None:
        """Call once in a micro step."""
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value.detach()

    def collect(self, accelerator) -> dict[str, float]:
        """Means over all processes, without losses that had no target; clears the sums."""
        device = accelerator.device
        sums = torch.tensor([*map(float, self.sums.values()), self.num_skipped], dtype=torch.float32, device=device)
        *sums, num_skipped = accelerator.reduce(sums, "sum").tolist()
        num_steps = [float(number) for number in self.num_steps.values()]
        record = {name: round(total / number, 5) for name, total, number in zip(self.names, sums, num_steps) if number}
        if num_skipped:
            record["skipped"] = int(num_skipped)
        self.clear()
        return record


class EveryStep(TrainerCallback):
    """On every process: averages the weights, measures the held-out losses, and ends a run that is asked to stop. On the main
    one: writes the log."""

    def __init__(self, trainer: Trainer, output_dir: Path, measure_every: int):
        self.trainer, self.path, self.measure_every = trainer, output_dir / "log.jsonl", measure_every

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.ema is not None:
            trainer.ema.update_parameters(trainer.unwrapped_model)
        if trainer.held_out and is_due(state, args, self.measure_every):
            trainer.log(trainer.measure_held_out())
        if trainer.stop.agreed(trainer.accelerator):
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:  # a summary since the last start of the run
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class SampleGrids(TrainerCallback):
    """Images of prompts, generated with the averaged weights, as a PNG; every process generates its share. Not with sharded
    weights."""

    def __init__(self, trainer: Trainer, recipe: HydraRecipe, prompts: list[str], output_dir: Path):
        self.trainer, self.recipe, self.prompts = trainer, recipe, prompts
        self.output_dir, self.every, self.seed = output_dir, recipe.sample_every, recipe.seed

    def on_step_end(self, args, state, control, **kwargs):
        if not is_due(state, args, self.every) or self.trainer.is_sharded:
            return
        rows = share_of(len(self.prompts), args.process_index, args.world_size)
        pipeline = create_pipeline(self.trainer.averaged_model.eval(), self.recipe)
        pipeline.set_progress_bar_config(disable=True)
        generators = [row_generator(self.seed, 1, row) for row in rows]
        images = pipeline(self.prompts[rows.start : rows.stop], generator=generators, output_type="pt").images
        images = gather_shares(self.trainer.accelerator, images, len(self.prompts))
        if state.is_world_process_zero:
            write_image_grid(self.output_dir / f"samples-{state.global_step:06d}.png", images * 2 - 1, num_columns=8)
            write_text(self.output_dir / "samples.txt", "\n".join(self.prompts) + "\n")


def is_due(state: TrainerState, args: TrainingArguments, every: int) -> bool:
    """Whether the step is a multiple of `every`, or the last one."""
    return state.global_step % every == 0 or state.global_step == args.max_steps


def create_pipeline(model: HydraForConditionalGeneration, recipe: HydraRecipe) -> HydraPipeline:
    """The model as a pipeline with the recipe's defaults."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return HydraPipeline(
        model=model, processor=recipe.processor, scheduler=FlowMatchEulerDiscreteScheduler(),
        default_num_inference_steps=recipe.num_inference_steps, default_guidance_scale=recipe.guidance_scale,
    )  # fmt: skip
