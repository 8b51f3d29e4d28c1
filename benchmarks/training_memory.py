"""Peak memory of a training step against what the dry run says, for micro batches of several sizes; on a GPU also its speed."""

import sys
import time
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import parser, report
from memory import MEGABYTE, peak_megabytes, used_megabytes
from models import SIZES, hydra_config, random_model, size_name, tiny_config
from torch import Tensor
from transformers import TrainerCallback

from hydra_hf import HydraConfig
from hydra_hf.data.tasks import TASKS
from hydra_hf.modeling.grid import pack_levels
from hydra_hf.training.bundle_trainer import BundleTrainer
from hydra_hf.training.dry_run import report_stage
from hydra_hf.training.objective import HydraObjective
from hydra_hf.training.recipe import HydraRecipe
from hydra_hf.training.recipes.hydra import stages
from hydra_hf.training.task_report import NOMINAL_TEXT_TOKENS


TASKS_OF_A_STEP = ("understand", "generate")
STEPS = 3  # the first one allocates the optimizer's state
MORE_STEPS = 1000  # than are made, so that nothing is saved at the end


def recipe_of(config: HydraConfig, num_samples: int, gradient_checkpointing: bool) -> HydraRecipe:
    """Stage II of HYDRA, which trains all but Gen-ViT, bottleneck and pixel decoder, with `num_samples` of each task in a step."""
    stage = replace(
        stages(config)[1], num_steps=MORE_STEPS, tasks=dict.fromkeys(TASKS_OF_A_STEP, num_samples), task_weights={}
    )
    return HydraRecipe(
        name="training_memory", config=config, stages=(stage,), tokenizer=None, processor=None,
        gradient_checkpointing=gradient_checkpointing, num_workers=0, save_every=MORE_STEPS, sample_every=MORE_STEPS,
    )  # fmt: skip


def batch_of(task: str, num_samples: int, config: HydraConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of random samples of the dry run's nominal length: 77 tokens of text, before or behind one image."""
    vision, size = config.vision_config, (num_samples, NOMINAL_TEXT_TOKENS)
    side = vision.image_size // vision.patch_size
    text = torch.randint(6, config.text_config.vocab_size, size, generator=generator)
    images = torch.full((num_samples, config.num_time_tokens + side**2), config.image_token_id)
    pixels = torch.randint(256, (3, vision.image_size, vision.image_size), generator=generator, dtype=torch.uint8)
    row = TASKS[task]
    ids = torch.cat([text, images] if row.generates else [images, text], dim=1)
    is_image = ids == config.image_token_id
    is_scored = ~is_image if row.scores_text else torch.arange(ids.shape[1]) == NOMINAL_TEXT_TOKENS - 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": is_image.long(),
        "labels": torch.where(is_scored, ids, -100),
        "pixel_values": pack_levels([pixels] * num_samples, vision.patch_size),
        "image_grid_thw": torch.tensor([[1, side, side]] * num_samples),
        "is_generated": torch.full((num_samples,), row.generates),
        "num_samples": num_samples,
    }


class StopAfter(TrainerCallback):
    """Ends a run after `STEPS` steps, and keeps the time of each."""

    def __init__(self):
        self.times = []

    def on_step_end(self, arguments, state, control, **others):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.times.append(time.perf_counter())
        control.should_training_stop = len(self.times) == STEPS


def measure(config: HydraConfig, num_samples: int, options: Namespace) -> dict:
    """One row: what the dry run says of a step, and what a step takes."""
    recipe = recipe_of(config, num_samples, not options.no_checkpointing)
    stage, generator = recipe.stages[0], torch.Generator().manual_seed(0)
    expected = report_stage(recipe, stage)
    bundle = {task: batch_of(task, num_samples, config, generator) for task in stage.tasks}
    rows = {task: list(range(num_samples)) for task in stage.tasks}
    bundles = [bundle | {"rows": rows, "step": step, "micro_step": 0, "skipped": {}} for step in range(STEPS + 1)]
    before, stop = used_megabytes(options.device), StopAfter()
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # the trainer's own lines

        def train() -> None:
            model = random_model(config, device=options.device).train()
            trainer = BundleTrainer(
                model, HydraObjective(stage, 0), stage, bundles, Path(folder), recipe=recipe, seed=0
            )
            trainer.add_callback(stop)
            trainer.train_stage()

        peak = peak_megabytes(train, options.device) - before
    dry_run = sum(expected.memory.values()) / MEGABYTE
    seconds = stop.times[-1] - stop.times[-2]
    return {
        "samples of each task": num_samples, "dry run MB": dry_run, "peak MB": peak, "peak / dry run": peak / dry_run,
        "seconds": seconds, "TFLOP/s": expected.flops / seconds / 1e12,
    }  # fmt: skip


def measure_all(options: Namespace) -> list[dict]:
    config = tiny_config() if options.tiny else hydra_config(options.size, SIZES[options.size][-1])
    return [measure(config, num_samples, options) for num_samples in options.samples]


def main(arguments: list[str] | None = None) -> None:
    arguments_parser = parser(__doc__, layers=28)
    arguments_parser.add_argument("--size", choices=SIZES, default="1.5B")
    arguments_parser.add_argument("--samples", type=int, nargs="+", default=[2, 8], help="of each task in a step")
    arguments_parser.add_argument("--no_checkpointing", action="store_true", help="keep activations")
    options = arguments_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report(f"Memory of a training step, {size_name(options.size, options)}", measure_all(options), options)


if __name__ == "__main__":
    main()
