"""What jobs ask the engine for: each kind of forward, and its result."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.cache_utils import Cache

from ..modeling.grid import Grid
from ..modeling.image_generation import GuidanceBranch
from ..modeling.prefix_cache import select_row


@dataclass(eq=False)
class Row:
    """The keys and values of one answer: a cache of its own, or a row of the cache that several share."""

    cache: Cache
    length: int
    index: int = 0

    def leave(self) -> Cache:
        """The cache (1, length) of this row alone, which is its own from now on."""
        self.cache, self.index = select_row(self.cache, self.index, self.length), 0
        return self.cache


@dataclass(eq=False)
class Prompt:
    """Runs the prompt of an answer, the processor's output for one conversation. Gives its row and logits (1, V)."""

    inputs: BatchFeature


@dataclass(eq=False)
class Token:
    """Runs the next token of a row. Gives logits (1, V)."""

    row: Row
    token: int


@dataclass(eq=False)
class Step:
    """A denoising step of latents (N, C) at `sigma`. Gives the velocity (N, C)."""

    latents: Tensor
    sigma: float
    branches: list[GuidanceBranch]
    grid: Grid


@dataclass(eq=False)
class Decode:
    """Turns latents (N, C) into pixels (3, H, W)."""

    latents: Tensor
    grid: Grid
    generator: torch.Generator = field(repr=False)


Work = Prompt | Token | Step | Decode
