"""Where a step's randomness comes from: pure functions of the seed, the step and the row, identical on every process.

So a run on many processes equals the run on one, and a resumed run sees what an uninterrupted one sees.
"""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from hydra_hf.data.seeds import hashed_generator
from hydra_hf.data.tasks import task_number
from hydra_hf.modeling.grid import Grid, count_images


SampleNoise = Callable[[list[Grid], torch.Generator], tuple[Tensor, Tensor]]  # grids -> sigma, packed noise


def row_generator(seed: int, step: int, row: int) -> torch.Generator:
    """The generator for all randomness of one sample of a step, whichever process it is on."""
    return hashed_generator(seed, step, row)


def grids_per_sample(batch: dict[str, Tensor], grids: list[Grid]) -> list[list[Grid]]:
    """`grids` of a batch, padded or packed, divided among its samples; an image is a run of image tokens."""
    rest = iter(grids)
    return [list(islice(rest, count)) for count in count_images(batch["mm_token_type_ids"], batch.get("document_ids"))]


def noise_number(row: int, number: int) -> int:
    """What tells the noise of a row of a task, by its number, from all others of a step: nine tasks in a block, so that a new task
    leaves the noise of the others as it is."""
    return number // 9 * 2**20 + row * 9 + number % 9


def row_noise(
    step: int, task: str, rows: list[int], grids: list[list[Grid]], sample: SampleNoise, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Noise levels and packed noise for a batch's images, given the `grids` of each sample, which has its own generator.

    `rows` are the numbers of the samples among the task's samples of the step.
    """
    assert len(rows) == len(grids), (rows, grids)
    sampled = [
        sample(own_grids, row_generator(seed, step, noise_number(row, task_number(task))))
        for row, own_grids in zip(rows, grids)
        if own_grids
    ]
    return tuple(torch.cat(parts) for parts in zip(*sampled))
