"""From latents to pixels: the flow decoder of HYDRA (section 3.2) and the ViT decoder of HYDRA-X (section 2).

Both take conditions (B, N, D), rows of images with `grids` (see `grid.py`), and return pixels from `decode`; `patches` are
pixels with the ViT's statistics, (B, N, 3 p p).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_hydra import PixelFlowDecoderConfig, PixelViTDecoderConfig
from .flow import euler_step, inference_sigmas, velocity_from_clean
from .grid import Grid, num_tokens, sinusoidal_positions_2d, varlen_arguments
from .layers import TimestepEmbedding, ViTLayer, ZeroLinear, modulate
from .temporal import (
    FrameCache,
    FrameLayout,
    TemporalUnfold,
    channels_to_frames,
    fold_factors,
    run_layers,
)


class FlowMLPBlock(GradientCheckpointingLayer):
    """Residual MLP on one patch, modulated by its condition and the noise level (AdaLN-Zero)."""

    def __init__(self, hidden_size: int, layer_norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.modulation = ZeroLinear(hidden_size, 3 * hidden_size)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        """`hidden_states` and `condition` (B, N, D) -> (B, N, D)."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        hidden_states_in = modulate(self.norm(hidden_states), shift, scale)
        return hidden_states + gate * self.fc2(nn.functional.silu(self.fc1(hidden_states_in)))


class PixelFlowDecoder(nn.Module):
    """Velocity of noisy pixels. Attention is global in the conditions; noisy patches do not attend to each other."""

    def __init__(self, config: PixelFlowDecoderConfig):
        super().__init__()
        self.config = config
        size, patch = config.hidden_size, config.num_channels * config.patch_size**2
        self.global_layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_global_layers)])
        self.condition_embedding = nn.Linear(size, size)
        self.time_embedding = TimestepEmbedding(size)
        self.patch_embedding = nn.Linear(patch, size)
        self.flow_layers = nn.ModuleList(
            [FlowMLPBlock(size, config.layer_norm_eps) for _ in range(config.num_flow_layers)]
        )
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.modulation = ZeroLinear(size, 2 * size)
        self.out_proj = ZeroLinear(size, patch)

    def get_conditions(self, hidden_states: Tensor, grids: Sequence[Grid], **kwargs) -> Tensor:
        """What all noise levels share: unprojected latents (B, N, D) -> conditions (B, N, D)."""
        positions = sinusoidal_positions_2d(grids, self.config.hidden_size, hidden_states)
        hidden_states = hidden_states + positions
        kwargs |= varlen_arguments([num_tokens(grid) for grid in grids], hidden_states.device)
        for layer in self.global_layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.condition_embedding(hidden_states + positions)

    def forward(self, noisy_patches: Tensor, sigma: Tensor, conditions: Tensor) -> Tensor:
        """Velocity (B, N, 3 p p) of `noisy_patches` at `sigma` (B,)."""
        condition = nn.functional.silu(conditions + self.time_embedding(sigma)[:, None])
        hidden_states = self.patch_embedding(noisy_patches.to(conditions.dtype))
        for layer in self.flow_layers:
            hidden_states = layer(hidden_states, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        output = self.out_proj(modulate(self.norm(hidden_states), shift, scale)).float()
        if self.config.prediction_type == "sample":
            return velocity_from_clean(noisy_patches.float(), output, sigma.float())
        return output

    def decode(
        self, hidden_states: Tensor, grids: Sequence[Grid], *, noise: Tensor, num_inference_steps: int | None = None
    ) -> Tensor:
        """Patches (B, N, 3 p p), by Euler steps from `noise` of the same shape."""
        conditions = self.get_conditions(hidden_states, grids)
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        sigmas = inference_sigmas(num_inference_steps)
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).to(noise)
        patches = noise
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:]):
            velocity = self(patches, sigma.expand(len(patches)), conditions)
            patches = euler_step(patches, velocity, sigma, next_sigma)
        return patches


class PixelViTDecoder(nn.Module):
    """Regresses the pixels in one pass, without noise. Clips are unfolded between layers, as the encoder folds them."""

    def __init__(self, config: PixelViTDecoderConfig):
        super().__init__()
        self.config = config
        factors = fold_factors(config.temporal_unfold_layers)
        self.head_factor = factors.pop(config.num_hidden_layers, 1)
        self.unfolds = nn.ModuleDict({
            str(layer): TemporalUnfold(config.hidden_size, factor) for layer, factor in factors.items()
        })  # fmt: skip
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, self.head_factor * config.num_channels * config.patch_size**2)

    def forward(
        self, hidden_states: Tensor, grids: Sequence[Grid], cache: FrameCache | None = None, **kwargs
    ) -> Tensor:
        """Unprojected latents (B, N, D) -> patches (B, N, 3 p p), of a clip those of all its frames.

        The `cache` is what earlier chunks of a clip left.
        """
        hidden_states = hidden_states + sinusoidal_positions_2d(grids, self.config.hidden_size, hidden_states)
        layout = FrameLayout(tuple(grids), start=0 if cache is None else cache.num_frames)
        hidden_states, layout = run_layers(self, self.unfolds, hidden_states, layout, cache, **kwargs)
        return channels_to_frames(self.out_proj(self.norm(hidden_states)).float(), layout, self.head_factor)

    def decode(
        self, hidden_states: Tensor, grids: Sequence[Grid], *, noise: Tensor | None = None, num_inference_steps: int | None = None
    ) -> Tensor:  # fmt: skip
        """The same call as the flow decoder's, with `noise` unused. Raises ValueError for more than one step."""
        if num_inference_steps not in (None, 1):
            raise ValueError(f"{num_inference_steps=}: the ViT decoder regresses pixels in one step.")
        return self(hidden_states, grids)


PIXEL_DECODERS = {PixelFlowDecoderConfig: PixelFlowDecoder, PixelViTDecoderConfig: PixelViTDecoder}
