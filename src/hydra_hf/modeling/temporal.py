"""Clips: frames folded into fewer and unfolded again, attention from frame to frame, positions in time. HYDRA-X, section 2.

A clip has 1 + 4n frames: an anchor, then groups of four; an image is an anchor alone. Every fold makes one frame of two, and the
anchor, which has no partner, of zeros and itself. So n frames of a clip are 1 + (n - 1) / 2 after a fold, and an image stays one.
A long clip goes through in chunks of whole groups; what a chunk leaves for the next one is a `FrameCache`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .grid import Grid, folded_length, varlen_arguments


Attention = tuple[Tensor, Tensor | None]
"""Outputs (B, N, heads, head_dim), and where the implementation gives them the weights (B, heads, N, N)."""


def unfolded_length(num_frames: int, factor: int) -> int:
    """The inverse of `folded_length`."""
    return max(0, 1 + (num_frames - 1) * factor)


@dataclass
class FrameCache:
    """What the chunks of a clip so far leave for the next one.

    Args:
        num_frames: how many they had, as they came into the network.
        states: of each attention the keys and values (B, heads, N, head_dim) of the last frame; causal attention needs all.
    """

    num_frames: int = 0
    states: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


def split_clip(clip: Tensor, chunk_frames: int, ratio: int, frames_per_step: int = 1) -> list[Tensor]:
    """A clip (B, C, T, H, W) in chunks of at most `chunk_frames` frames, of which all but the first have as many.

    Args:
        ratio: frames that are one latent frame.
        frames_per_step: what one step along T stands for: `ratio` in latents.

    Raises ValueError for what is no clip, and for chunks that would cut a latent frame.
    """
    if clip.ndim != 5:
        raise ValueError(f"chunk_frames={chunk_frames} cuts clips (B, C, T, H, W), got {tuple(clip.shape)}.")
    if chunk_frames < ratio or chunk_frames % ratio:
        raise ValueError(f"{chunk_frames=} must be a positive multiple of the {ratio} frames of a latent frame.")
    first = 1 + (chunk_frames - ratio) // frames_per_step
    rest = clip[:, :, first:].split(chunk_frames // frames_per_step, dim=2) if clip.shape[2] > first else ()
    return [clip[:, :, :first], *rest]


@dataclass(frozen=True)
class FrameLayout:
    """Where the frames of a row (B, N, D) are, at one depth of a network.

    Args:
        grids: of the images and clips of the row, see `grid.py`, in frames of this depth.
        num_leading: tokens in front of each frame: a class token.
        start: how many frames of the clip earlier chunks had, at this depth.
    """

    grids: tuple[Grid, ...]
    num_leading: int = 0
    start: int = 0

    @property
    def frame_sizes(self) -> list[int]:
        """Tokens in a frame of each image or clip."""
        return [self.num_leading + h * w for _, h, w in self.grids]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image or clip."""
        return [grid[0] * size for grid, size in zip(self.grids, self.frame_sizes)]

    def apply(self, function: Callable[[Tensor], Tensor], hidden_states: Tensor) -> Tensor:
        """What `function` makes of the frames (B, T, S, D) of each image or clip, as a row."""
        parts = hidden_states.split(self.lengths, dim=1)
        parts = [function(part.unflatten(1, (grid[0], -1))).flatten(1, 2) for part, grid in zip(parts, self.grids)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def folded(self, factor: int) -> "FrameLayout":
        return self._counted(lambda num_frames: folded_length(num_frames, factor))

    def unfolded(self, factor: int) -> "FrameLayout":
        return self._counted(lambda num_frames: unfolded_length(num_frames, factor))

    def _counted(self, count: Callable[[int], int]) -> "FrameLayout":
        start = count(self.start)
        grids = tuple((count(self.start + t) - start, h, w) for t, h, w in self.grids)
        return replace(self, grids=grids, start=start)


# Folds


def group_frames(frames: Tensor, factor: int, start: int = 0) -> Tensor:
    """Frames (B, T, ...) in groups (B, T', factor, ...); zeros fill up the anchor's, in front of it (our choice)."""
    if start == 0 and factor > 1:
        zeros = frames.new_zeros(len(frames), factor - 1, *frames.shape[2:])
        frames = torch.cat([zeros, frames], dim=1)
    return frames.unflatten(1, (-1, factor))


def ungroup_frames(groups: Tensor, start: int = 0) -> Tensor:
    """Groups (B, T', factor, ...) to frames (B, T, ...), without the padding in front of the anchor."""
    frames = groups.flatten(1, 2)
    return frames[:, groups.shape[2] - 1 :] if start == 0 else frames


def channels_to_frames(hidden_states: Tensor, layout: FrameLayout, factor: int) -> Tensor:
    """(B, N, factor D) -> (B, N', D): the frames that each frame of a row holds in its channels."""
    if factor == 1:
        return hidden_states
    return layout.apply(
        lambda frames: ungroup_frames(frames.unflatten(-1, (factor, -1)).transpose(2, 3), layout.start), hidden_states
    )


class FrameLinear(nn.Linear):
    """A projection of a group of frames to one, or of one to a group."""

    def init_identity(self) -> None:
        """One of a group starts as its last frame, which the anchor is in its own, so that images start as if there were no
        fold; all of a group start as copies (our choice)."""
        size = min(self.weight.shape)
        identity = torch.eye(size, dtype=self.weight.dtype, device=self.weight.device)
        is_fold = self.in_features > self.out_features
        fold = nn.functional.pad(identity, (self.in_features - size, 0))
        init.copy_(self.weight, fold if is_fold else identity.repeat(self.out_features // size, 1))
        init.zeros_(self.bias)


def widen_projection(weight: Tensor, factor: int) -> Tensor:
    """A patch projection's weight (D, C, p, p) for `factor` frames that become one: it reads the last of them, where an anchor
    is, and none of the others."""
    return nn.functional.pad(weight, (0, 0, 0, 0, (factor - 1) * weight.shape[1], 0))


class TemporalFold(nn.Module):
    """`factor` frames to one: their channels next to each other, then projected."""

    def __init__(self, hidden_size: int, factor: int):
        super().__init__()
        self.factor = factor
        self.projection = FrameLinear(factor * hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, layout: FrameLayout) -> Tensor:
        """(B, N, D) of `layout` -> (B, N', D) of the folded layout."""
        return layout.apply(lambda frames: self.projection(self._grouped(frames, layout.start)), hidden_states)

    def resize(self, layout: FrameLayout) -> FrameLayout:
        return layout.folded(self.factor)

    def _grouped(self, frames: Tensor, start: int) -> Tensor:
        """(B, T, S, D) -> (B, T', S, factor D)."""
        return group_frames(frames, self.factor, start).transpose(2, 3).flatten(3)


class TemporalUnfold(nn.Module):
    """One frame to `factor`: projected, then cut along its channels."""

    def __init__(self, hidden_size: int, factor: int):
        super().__init__()
        self.factor = factor
        self.projection = FrameLinear(hidden_size, factor * hidden_size)

    def forward(self, hidden_states: Tensor, layout: FrameLayout) -> Tensor:
        """(B, N, D) of `layout` -> (B, N', D) of the unfolded layout."""
        return channels_to_frames(self.projection(hidden_states), layout, self.factor)

    def resize(self, layout: FrameLayout) -> FrameLayout:
        return layout.unfolded(self.factor)


def fold_factors(layers: list[int]) -> dict[int, int]:
    """Layer -> how many frames are one in front of it: a layer named twice has one fold of 4."""
    return {layer: 2 ** layers.count(layer) for layer in layers}


# Attention


@dataclass(frozen=True)
class FrameAttention:
    """Attention of a frame to its own and the one before ("tubelet"), or to all before ("causal"), in rows of one grid.

    No mask is made: the frames that see equally many keys are the batch of one call.
    """

    mode: str
    num_frames: int
    cache: FrameCache | None = None

    def __call__(
        self, attend: Callable[..., Attention], module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> Attention:
        """`attend(query, key, value)` for queries, keys and values (B, heads, N, head_dim) of the attention `module`."""
        frame_size = query.shape[2] // self.num_frames
        if self.cache is not None:
            if earlier := self.cache.states.get(module):
                key, value = (torch.cat(pair, dim=2) for pair in zip(earlier, (key, value)))
            kept = slice(-frame_size, None) if self.mode == "tubelet" else slice(None)
            self.cache.states[module] = key[:, :, kept].clone(), value[:, :, kept].clone()
        frames = [states.unflatten(2, (-1, frame_size)) for states in (query, key, value)]
        parts = (self._tubelet if self.mode == "tubelet" else self._causal)(attend, *frames)
        output = torch.cat([output for output, _, _ in parts], dim=1)
        if module.config._attn_implementation != "eager":  # the others give no map
            return output, None
        weights = [nn.functional.pad(map_, (left, key.shape[2] - left - map_.shape[3])) for _, map_, left in parts]
        return output, torch.cat(weights, dim=2)

    def _tubelet(self, attend: Callable[..., Attention], query: Tensor, key: Tensor, value: Tensor) -> list[tuple]:
        """Outputs, weights and the first key that was seen, of frames (B, heads, T, S, head_dim) one after the other.

        `key` and `value` have one frame more if there is an earlier chunk.
        """
        parts, num_paired = [], key.shape[2] - 1
        if num_paired < self.num_frames:  # the anchor sees itself alone
            parts.append((*attend(query[:, :, 0], key[:, :, 0], value[:, :, 0]), 0))
        if num_paired:
            frame_size = query.shape[3]
            key, value = (
                states.flatten(2, 3).unfold(2, 2 * frame_size, frame_size).transpose(3, 4) for states in (key, value)
            )  # views of (B, heads, T, 2 S, head_dim): neighbours overlap, and a single clip is not copied
            paired = [states.transpose(1, 2).flatten(0, 1) for states in (query[:, :, -num_paired:], key, value)]
            outputs, weights = (None if x is None else x.unflatten(0, (-1, num_paired)) for x in attend(*paired))
            for index in range(num_paired):
                own_weights = None if weights is None else weights[:, index]
                parts.append((outputs[:, index], own_weights, index * frame_size))
        return parts

    def _causal(self, attend: Callable[..., Attention], query: Tensor, key: Tensor, value: Tensor) -> list[tuple]:
        num_earlier, parts = key.shape[2] - self.num_frames, []
        for index in range(self.num_frames):
            seen = slice(num_earlier + index + 1)
            attended = attend(query[:, :, index], key[:, :, seen].flatten(2, 3), value[:, :, seen].flatten(2, 3))
            parts.append((*attended, 0))
        return parts


@dataclass(frozen=True)
class RowFrameAttention:
    """The same in a row of several grids, for flash attention: each frame is a sequence, and its keys are copied for it."""

    key_index: Tensor
    varlen: dict

    def __call__(
        self, attend: Callable[..., Attention], module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> Attention:
        return attend(query, key[:, :, self.key_index], value[:, :, self.key_index], **self.varlen)


def _row_frame_attention(mode: str, layout: FrameLayout, device: torch.device) -> RowFrameAttention:
    ranges, query_lengths, begin = [], [], 0
    for (num_frames, _, _), size in zip(layout.grids, layout.frame_sizes):
        for frame in range(num_frames):
            first = max(frame - 1, 0) if mode == "tubelet" else 0
            ranges.append((begin + first * size, begin + (frame + 1) * size))
            query_lengths.append(size)
        begin += num_frames * size
    key_lengths = [end - start for start, end in ranges]
    varlen = {
        "cu_seq_lens_q": torch.tensor([0, *accumulate(query_lengths)], dtype=torch.int32, device=device),
        "cu_seq_lens_k": torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32, device=device),
        "max_length_q": max(query_lengths),
        "max_length_k": max(key_lengths),
    }
    return RowFrameAttention(torch.cat([torch.arange(*r, device=device) for r in ranges]), varlen)


def attention_arguments(config, layout: FrameLayout, like: Tensor, cache: FrameCache | None = None) -> dict:
    """What tells the layers at one depth which tokens see each other, and where they are."""
    arguments = {}
    if config.rotary_axes:
        arguments["rotary"] = rotary_positions_3d(layout, config.rotary_axes, _head_dim(config), like)
    has_clips = cache is not None or any(grid[0] > 1 for grid in layout.grids)
    if not has_clips or config.temporal_attention == "full":
        arguments |= varlen_arguments(layout.lengths, like.device)
    elif len(layout.grids) == 1:
        arguments["frames"] = FrameAttention(config.temporal_attention, layout.grids[0][0], cache)
    else:
        arguments["frames"] = _row_frame_attention(config.temporal_attention, layout, like.device)
    return arguments


def run_layers(
    network: nn.Module, resizers: Mapping[str, nn.Module], hidden_states: Tensor, layout: FrameLayout,
    cache: FrameCache | None = None, layer_outputs: list[Tensor] | None = None, **kwargs,
) -> tuple[Tensor, FrameLayout]:  # fmt: skip
    """A row (B, N, D) through the layers of `network`, in front of some of which a fold or an unfold resizes clips; and its
    layout then. The outputs of all layers are appended to `layer_outputs`."""
    arguments = attention_arguments(network.config, layout, hidden_states, cache)
    for index, layer in enumerate(network.layers):
        if str(index) in resizers:
            resizer = resizers[str(index)]
            hidden_states, layout = resizer(hidden_states, layout), resizer.resize(layout)
            arguments = attention_arguments(network.config, layout, hidden_states, cache)
        hidden_states = layer(hidden_states, **arguments, **kwargs)
        if layer_outputs is not None:
            layer_outputs.append(hidden_states)
    return hidden_states, layout


# Positions


def _head_dim(config) -> int:
    return config.hidden_size // config.num_attention_heads


def rotary_positions_3d(
    layout: FrameLayout, axes: list[int], head_dim: int, like: Tensor, theta: int = 10_000
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, head_dim) that turn `axes` dimensions of each head with the frame, the row and the column."""
    positions = torch.cat([_frame_positions(grid, layout, like.device) for grid in layout.grids])  # (N, 3)
    angles = []
    for axis, size in enumerate(axes):
        frequencies = theta ** -(torch.arange(size // 2, dtype=torch.float32, device=like.device) / (size // 2))
        angles.append(positions[:, axis, None] * frequencies)
    angles = nn.functional.pad(torch.cat(angles, dim=-1), (0, (head_dim - sum(axes)) // 2))  # the rest does not turn
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _frame_positions(grid: Grid, layout: FrameLayout, device: torch.device) -> Tensor:
    """Frame, row and column of each token (N, 3); a class token is at the frame's origin."""
    num_frames, height, width = grid
    axes = [torch.arange(size, device=device) for size in (height, width)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    places = nn.functional.pad(places, (0, 0, layout.num_leading, 0))
    frames = torch.arange(layout.start, layout.start + num_frames, device=device)
    frames = frames[:, None, None].expand(-1, len(places), 1)
    return torch.cat([frames, places.expand(num_frames, -1, -1)], dim=-1).flatten(0, 1)
