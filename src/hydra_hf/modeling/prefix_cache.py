"""The keys and values of a prompt, which every denoising step reads and none writes; and rows of several caches as one.

Works for any language model that takes a transformers `Cache`; the tensors of a prefix are shared, not copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer


class FrozenLayer(DynamicLayer):
    """`update` returns the prefix followed by the new states, and keeps only the prefix."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, P + N, head_dim) of the prefix and of new states (B, heads, N, head_dim)."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def create_layer(layer_class: type[DynamicLayer], keys: Tensor, values: Tensor) -> DynamicLayer:
    """A layer of a cache that begins with these keys and values (B, heads, P, head_dim)."""
    layer = layer_class()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    return layer


class FrozenPrefixCache(Cache):
    """The cache of a prefilled prompt as a constant."""

    @classmethod
    def from_cache(cls, cache: Cache) -> "FrozenPrefixCache":
        """Freezes a prefilled cache. Raises ValueError for layers that drop old states (sliding windows)."""
        layers = []
        for layer in cache.layers:
            if type(layer) is not DynamicLayer:
                raise ValueError(f"A prefix of {type(layer).__name__} cannot be frozen; expected DynamicLayer.")
            layers.append(create_layer(FrozenLayer, layer.keys, layer.values))
        return cls(layers=layers)


def pad_left(tensor: Tensor, length: int, dim: int) -> Tensor:
    """`tensor` with zeros before it, so that its size along `dim`, counted from the end, is `length`."""
    return nn.functional.pad(tensor, (*(0, 0) * (-1 - dim), length - tensor.shape[dim], 0))


def join_rows(caches: Sequence[Cache]) -> Cache:
    """One cache of the same kind with the rows of several; shorter prompts are padded on the left, where a mask must hide them."""
    length = max(cache.get_seq_length() for cache in caches)
    layers = []
    for parts in zip(*(cache.layers for cache in caches)):
        keys, values = (
            torch.cat([pad_left(states, length, dim=-2) for states in rows])
            for rows in zip(*((part.keys, part.values) for part in parts))
        )
        layers.append(create_layer(type(parts[0]), keys, values))
    return Cache(layers=layers)


def select_row(cache: Cache, row: int, length: int) -> Cache:
    """One row of a cache, (1, heads, length, head_dim), without its padding; the tensors are shared until it grows."""
    return Cache(
        layers=[
            create_layer(type(layer), *(states[row : row + 1, :, -length:] for states in (layer.keys, layer.values)))
            for layer in cache.layers
        ]
    )
