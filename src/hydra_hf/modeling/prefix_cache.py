"""The keys and values of a prompt, which every denoising step reads and none writes.

Works for any language model that takes a transformers `Cache`; the tensors are shared, not copied.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class FrozenLayer(DynamicLayer):
    """`update` returns the prefix followed by the new states, and keeps only the prefix."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, P + N, head_dim) of the prefix and of new states (B, heads, N, head_dim)."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class FrozenPrefixCache(Cache):
    """The cache of a prefilled prompt as a constant."""

    @classmethod
    def from_cache(cls, cache: DynamicCache) -> "FrozenPrefixCache":
        """Freezes a prefilled cache. Raises ValueError for layers that drop old states (sliding windows)."""
        layers = []
        for layer in cache.layers:
            if type(layer) is not DynamicLayer:
                raise ValueError(f"A prefix of {type(layer).__name__} cannot be frozen; expected DynamicLayer.")
            frozen = FrozenLayer()
            frozen.keys, frozen.values = layer.keys, layer.values
            frozen.dtype, frozen.device, frozen.is_initialized = layer.keys.dtype, layer.keys.device, True
            layers.append(frozen)
        return cls(layers=layers)
