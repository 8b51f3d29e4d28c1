"""Where a step's randomness comes from: pure functions of the seed, the step and the row, identical on every process.

So a run on many processes is the run on one, and a resumed run sees what the uninterrupted one saw.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hydra_hf.data.seeds import hashed_generator
from hydra_hf.data.tasks import TASKS, task_number


SampleNoise = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # number of images -> sigma, noise


def step_generator(seed: int, step: int) -> torch.Generator:
    """All randomness of one step."""
    return hashed_generator(seed, step)


def row_generator(seed: int, step: int, row: int) -> torch.Generator:
    """All randomness of one sample of a step, whichever process it is on."""
    return hashed_generator(seed, step, row)


def count_images(mm_token_type_ids: Tensor) -> list[int]:
    """Images of each row (B, L): runs of image tokens."""
    is_image = mm_token_type_ids == 1
    starts = is_image & ~nn.functional.pad(is_image, (1, 0), value=False)[:, :-1]
    return starts.sum(dim=1).tolist()


def row_noise(
    step: int, task: str, rows: list[int], images_per_row: list[int], sample: SampleNoise, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Noise levels and noise of a batch's images: every row has a generator of its own."""
    assert len(rows) == len(images_per_row), (rows, images_per_row)
    sampled = [
        sample(num_images, row_generator(seed, step, row * len(TASKS) + task_number(task)))
        for row, num_images in zip(rows, images_per_row)
    ]
    return tuple(torch.cat(parts) for parts in zip(*sampled))
