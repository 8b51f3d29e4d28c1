"""Source-target interaction (STI): in Sem-ViT, an edited image sees the images that it is made from. HYDRA-X, section 3.

Source and target are the two frames of a clip under tubelet attention: the source sees itself alone, like every given image, and the
target sees both. Gen-ViT encodes them apart. Several sources, of any sizes, are all seen by the target (our choice).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .grid import Grid


@dataclass
class SourceStates:
    """What targets see of their sources: of each attention in Sem-ViT the keys and values (B, heads, N, head_dim)."""

    states: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def record(self, attend: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor):
        """The attention of a source, which sees itself alone; its keys and values are kept."""
        self.states[module] = key, value
        return attend(query, key, value)

    def interact(self, attend: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor):
        """The attention of a target, which sees its sources and itself."""
        pairs = zip(self.states[module], (key, value))
        return attend(query, *[torch.cat([source.to(own.dtype), own], dim=2) for source, own in pairs])

    def repeat_interleave(self, repeats: int) -> "SourceStates":
        """Each row `repeats` times."""
        return SourceStates({
            module: tuple(states.repeat_interleave(repeats, dim=0) for states in pair)
            for module, pair in self.states.items()
        })  # fmt: skip

    @classmethod
    def joined(cls, sources: Sequence["SourceStates"]) -> "SourceStates":
        """The states of several sources of each row, one behind the other."""
        if len(sources) == 1:
            return sources[0]
        pairs = {module: zip(*[source.states[module] for source in sources]) for module in sources[0].states}
        return cls({module: tuple(torch.cat(parts, dim=2) for parts in pair) for module, pair in pairs.items()})

    @classmethod
    def stacked(cls, sources: Sequence["SourceStates | None"]) -> "SourceStates | None":
        """The rows of several states one below the other. Raises ValueError unless all have sources of one size, or none has."""
        if all(source is None for source in sources):
            return None
        sizes = {None if source is None else source.num_tokens for source in sources}
        if len(sizes) > 1:
            raise ValueError(
                f"Got sources of {sorted(sizes, key=str)} tokens in one batch, expected as many in each row."
            )
        pairs = {module: zip(*[source.states[module] for source in sources]) for module in sources[0].states}
        return cls({module: tuple(map(torch.cat, pair)) for module, pair in pairs.items()})

    @property
    def num_tokens(self) -> int:
        """How many tokens of sources a target sees."""
        return next(iter(self.states.values()))[0].shape[2]


def group_targets(grids: Sequence[Grid], num_sources: Sequence[int]) -> list[list[int]]:
    """The targets among packed images, by number, in groups that can be rows of one call: their grids and their sources' are equal.

    Args:
        num_sources: how many images directly before it each image is made from; 0 for most.

    Raises ValueError for sources that do not exist, or have sources themselves.
    """
    groups: dict[tuple[Grid, ...], list[int]] = {}
    for target, count in enumerate(num_sources):
        sources = range(target - count, target)
        if count < 0 or sources.start < 0 or any(num_sources[source] for source in sources):
            raise ValueError(
                f"num_sources={list(num_sources)} is wrong at image {target}: the {count} images directly before it must"
                " exist and have no sources themselves."
            )
        if count:
            groups.setdefault(tuple(grids[target - count : target + 1]), []).append(target)
    return list(groups.values())
