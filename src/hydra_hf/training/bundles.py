"""What one optimizer step is made of: a batch for each task, and the noise of its images.

Both are functions of the seed, the step and the sample's row in the global batch, whatever process asks for them: so a
run on many processes is the run on one, and needs no more than its step to go on.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hydra_hf.data.collate import collate
from hydra_hf.data.sample import TASKS, Sample
from hydra_hf.data.toy_language import ToyLanguage
from hydra_hf.modeling import HydraProcessor

from .batches import row_generator, step_generator
from .recipe import HydraStage


DrawImages = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # number of images -> sigma, noise
Noise = Callable[[int, str, list[int], list[int], DrawImages], tuple[Tensor, Tensor]]  # `row_noise` with a seed


class ToyBundles(Dataset):
    """What `data.mixture.Bundles` is to data sets: bundle `index` of a stage of the toy world, the same for every asker.

    The whole batch of the step is made, and of each task every (num_processes x accumulation)-th row is kept.
    """

    def __init__(
        self,
        language: ToyLanguage,
        processor: HydraProcessor,
        stage: HydraStage,
        seed: int,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        accumulation: int = 1,
    ):
        self.language, self.processor, self.stage, self.seed = language, processor, stage, seed
        self.process_index, self.num_processes, self.accumulation = process_index, num_processes, accumulation

    def __len__(self) -> int:
        return self.stage.num_steps * self.accumulation

    def __getitem__(self, index: int) -> dict:
        step, micro_step = divmod(index, self.accumulation)
        generator = step_generator(self.seed, step)
        bundle, rows = {}, {}
        for task, count in self.stage.tasks.items():
            samples = self.samples(task, generator)
            first = self.process_index + micro_step * self.num_processes
            mine = list(range(first, count, self.num_processes * self.accumulation))
            rows[task] = mine or [count]  # a blank one, so that every process runs the same forwards
            bundle[task] = collate([samples[row] for row in mine or [0]], self.processor)
            bundle[task]["num_samples"] = len(mine)
        return {**bundle, "rows": rows, "step": step, "micro_step": micro_step, "skipped": {}}

    def state_dict(self, step: int) -> dict:
        """Nothing: the step is all that a resumed run needs."""
        return {}

    def samples(self, task: str, generator: torch.Generator) -> list[Sample]:
        stage, count = self.stage, self.stage.tasks[task]
        if task == "generate":
            return self.language.generate_samples(
                count, generator, max_objects=stage.max_objects, drop_prompt=stage.drop_prompt
            )
        if task == "understand":
            return self.language.understand_samples(
                count,
                generator,
                stage.questions_per_image,
                max_objects=stage.max_objects,
                weights=stage.question_weights,
            )
        raise ValueError(f"{task=} of stage {stage.name!r} is not one that the toy world has: generate, understand.")


def num_accumulation_steps(tasks: dict[str, int], num_processes: int, micro_batch_size: int | None) -> int:
    """Forwards and backwards of one process in one step, so that none has more than `micro_batch_size` samples.

    Every task is in every one of them. Raises ValueError for a size smaller than the number of tasks.
    """
    if micro_batch_size is None:
        return 1
    if micro_batch_size < len(tasks):
        raise ValueError(f"{micro_batch_size=} must be at least {len(tasks)}, one sample for each of {list(tasks)}.")
    accumulation = 1
    while sum(-(-count // (num_processes * accumulation)) for count in tasks.values()) > micro_batch_size:
        accumulation += 1
    return accumulation


# Noise


def count_images(mm_token_type_ids: Tensor) -> list[int]:
    """Images of each row (B, L): runs of image tokens."""
    is_image = mm_token_type_ids == 1
    starts = is_image & ~nn.functional.pad(is_image, (1, 0), value=False)[:, :-1]
    return starts.sum(dim=1).tolist()


def stream_noise(
    step: int, task: str, rows: list[int], images_per_row: list[int], draw: DrawImages, *, seed: int,
    tasks: dict[str, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For the toy world, where a sample has one image: the global batch is drawn in one stream, and `rows` are taken."""
    generator = step_generator(seed, step + (1 << 31))
    drawn = {name: draw(count, generator) for name, count in tasks.items()}[task]
    assert images_per_row == [1] * len(rows), images_per_row
    return tuple(
        part[[row % tasks[task] for row in rows]] for part in drawn
    )  # a blank sample's row is one past the last


def row_noise(
    step: int, task: str, rows: list[int], images_per_row: list[int], draw: DrawImages, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Every row has a generator of its own, so that nobody draws what another process needs."""
    assert len(rows) == len(images_per_row), (rows, images_per_row)
    drawn = [
        draw(num_images, row_generator(seed, step, row * len(TASKS) + TASKS.index(task)))
        for row, num_images in zip(rows, images_per_row)
    ]
    return tuple(torch.cat(parts) for parts in zip(*drawn))
