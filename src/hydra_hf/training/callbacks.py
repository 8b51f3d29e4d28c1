"""What happens beside the steps of HYDRA's training: the average, the log and pictures of what the model draws."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hydra_hf.files import write_image_grid
from hydra_hf.modeling import HydraForConditionalGeneration, HydraProcessor
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from .randomness import step_generator


LOSSES = ("language", "flow")


class LossHistory:
    """Sums of the losses and of skipped records since the last log, on their device: reading them would wait for it."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor | float] = dict.fromkeys(LOSSES, 0.0)
        self.num_steps: dict[str, Tensor | float] = dict.fromkeys(LOSSES, 0.0)  # in which a loss had a target
        self.num_skipped = 0

    def count(self, has_target: dict[str, Tensor], num_skipped: int) -> None:
        """Once in an optimizer step."""
        for name in LOSSES:
            self.num_steps[name] = self.num_steps[name] + has_target[name]
        self.num_skipped += num_skipped

    def add(self, losses: dict[str, Tensor]) -> None:
        """Once in a micro step."""
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value.detach()

    def collect(self, accelerator) -> dict[str, float]:
        """Over all processes; a loss that had no target is left out. Starts again from nothing."""
        device = accelerator.device
        sums = torch.tensor([*map(float, self.sums.values()), self.num_skipped], dtype=torch.float32, device=device)
        *sums, num_skipped = accelerator.reduce(sums, "sum").tolist()
        num_steps = [float(number) for number in self.num_steps.values()]
        record = {name: round(total / number, 5) for name, total, number in zip(LOSSES, sums, num_steps) if number}
        if num_skipped:
            record["skipped"] = int(num_skipped)
        self.clear()
        return record


class EveryStep(TrainerCallback):
    """Averages the weights, on every process alike, and writes the log, on the main one."""

    def __init__(self, trainer: Trainer, output_dir: Path):
        self.trainer, self.path = trainer, output_dir / "log.jsonl"

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.ema is not None:
            trainer.ema.update_parameters(trainer.accelerator.unwrap_model(trainer.model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class SampleGrids(TrainerCallback):
    """Draws prompts with the averaged weights, as a PNG, on the main process; not from sharded weights."""

    def __init__(
        self, trainer: Trainer, processor: HydraProcessor, prompts: list[str], output_dir: Path, every: int, seed: int
    ):
        self.trainer, self.processor, self.prompts = trainer, processor, prompts
        self.output_dir, self.every, self.seed = output_dir, every, seed

    def on_step_end(self, args, state, control, **kwargs):
        is_due = state.global_step % self.every == 0 or state.global_step == args.max_steps
        if not is_due or not state.is_world_process_zero or self.trainer.is_sharded:
            return
        pipeline = create_pipeline(self.trainer.averaged_model.eval(), self.processor)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(self.prompts, generator=step_generator(self.seed, 1), output_type="pt").images
        write_image_grid(self.output_dir / f"samples-{state.global_step:06d}.png", images * 2 - 1, num_columns=8)
        (self.output_dir / "samples.txt").write_text("\n".join(self.prompts) + "\n")


def create_pipeline(model: HydraForConditionalGeneration, processor: HydraProcessor) -> HydraPipeline:
    """The pipeline that the tiny checkpoint is shipped as."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return HydraPipeline(
        model=model, processor=processor, scheduler=FlowMatchEulerDiscreteScheduler(),
        default_num_inference_steps=24, default_guidance_scale=2.0,
    )  # fmt: skip
