"""Which process has which rows of a step, and where their pixels and randomness come from: pure functions of its number, so that a run can be resumed."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from accelerate import PartialState
from torch import Tensor

from hydra_hf.data.toy_world import ToyWorld

from .recipe import Recipe, TokenizerStage


def partial_state() -> PartialState:
    """Which process this is; on CPUs, several talk through gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def step_generator(seed: int, step: int) -> torch.Generator:
    """All randomness of one step, so that a resumed run sees what the unbroken one saw."""
    return _hashed_generator(f"{seed} {step}")


def row_generator(seed: int, step: int, row: int) -> torch.Generator:
    """All randomness of one sample of a step, whichever process it is on."""
    return _hashed_generator(f"{seed} {step} {row}")


def _hashed_generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))  # a CPU generator reads no more than 32 bits


def split_batch(batch_size: int, num_processes: int, micro_batch_size: int | None) -> tuple[int, int]:
    """Samples of a process at once, and how often it accumulates. ValueError if they do not make up the batch exactly."""
    micro = batch_size // num_processes if micro_batch_size is None else micro_batch_size
    if micro < 1 or batch_size % (num_processes * micro):
        raise ValueError(f"{batch_size=} must be a multiple of {num_processes=} times {micro_batch_size=}.")
    return micro, batch_size // (num_processes * micro)


class Batches(Protocol):
    """Rows of the batch of a step, (len(rows), 3, H, W) in [-1, 1], the same whenever and wherever they are asked for."""

    num_skipped: dict[str, int]

    def __call__(self, step: int, rows: range) -> Tensor: ...


def check_range(pixel_values: Tensor) -> Tensor:
    """The pixels, if they are in [-1, 1]; ValueError if not, before a judge is misled by them."""
    low, high = pixel_values.aminmax()
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"Pixels reach from {low.item():.3f} to {high.item():.3f}, expected [-1, 1].")
    return pixel_values


class ReadAhead:
    """The rows of a process, micro step after micro step; a thread reads the next ones meanwhile."""

    def __init__(self, batches: Batches, rows: list[range]):
        self.batches, self.rows = batches, rows
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.ahead: dict[tuple[int, int], Future] = {}

    def __call__(self, step: int, micro_step: int) -> Tensor:
        """Rows `micro_step` of a step, in [-1, 1]."""
        pixel_values = self._find(step, micro_step).result()
        following = divmod(step * len(self.rows) + micro_step + 1, len(self.rows))
        self.ahead = {following: self._find(*following)}
        return check_range(pixel_values)

    def _find(self, step: int, micro_step: int) -> Future:
        if (step, micro_step) in self.ahead:
            return self.ahead[step, micro_step]
        return self.reader.submit(self.batches, step, self.rows[micro_step])


def toy_images(world: ToyWorld, num_images: int, generator: torch.Generator) -> Tensor:
    """A batch (B, 3, H, W) of scenes: three fifths as they look, one fifth depth maps, one fifth segmentations."""
    num_maps = num_images // 5
    scenes = world.sample_scenes(num_images, generator)
    depth, segments = world.render_depth(scenes[:num_maps]), world.render_segmentation(scenes[num_maps : 2 * num_maps])
    return torch.cat([depth, segments, world.render(scenes[2 * num_maps :])])


class ToyBatches:
    """`toy_images` as training data."""

    def __init__(self, world: ToyWorld, batch_size: int, seed: int):
        self.world, self.batch_size, self.seed = world, batch_size, seed
        self.num_skipped = {}

    def __call__(self, step: int, rows: range) -> Tensor:
        return toy_images(self.world, self.batch_size, step_generator(self.seed, step))[rows.start : rows.stop]


class ToyHeldOut:
    """Scenes that the toy world never shows in training, the same at every step."""

    def __init__(self, world: ToyWorld, num_images: int, seed: int):
        self.world, self.num_skipped = world, {}
        self.scenes = world.sample_scenes(num_images, step_generator(seed, 0), split="test")

    def __call__(self, step: int, rows: range) -> Tensor:
        return self.world.render(self.scenes[rows.start : rows.stop])


def create_batches(recipe: Recipe, stage: TokenizerStage, seed: int) -> tuple[Batches, Batches]:
    """What a stage is trained on, and what it is measured on. ValueError for data without held-out images."""
    if not recipe.data:
        world = ToyWorld(recipe.difficulty)
        return ToyBatches(world, stage.batch_size, seed), ToyHeldOut(world, stage.num_held_out, seed)
    if not stage.held_out:
        raise ValueError(f"{recipe.name}: data={recipe.data} needs held_out images too, which are not trained on.")
    from hydra_hf.data.mixture import ImageBatches  # opens the data

    size = recipe.config.image_size
    return (
        ImageBatches(recipe.data, size, seed, batch_size=stage.batch_size),
        ImageBatches(stage.held_out, size, 0, batch_size=stage.num_held_out),
    )
