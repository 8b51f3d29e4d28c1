"""Vision head: AdaLN-Zero blocks that turn the LLM's states of an image into the velocity of its latents. HYDRA, section 2.2."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .configuration_hydra import HydraConfig
from .grid import Grid, in_rows, num_tokens, rotary_positions_2d, varlen_arguments
from .layers import AdaLNZeroLayer, TimestepEmbedding, ZeroLinear, modulate


class VisionHead(nn.Module):
    """States (B, N, D_llm) of image tokens and their noise level -> velocity (B, N, C); tokens attend to their own image only."""

    def __init__(self, config: HydraConfig):
        super().__init__()
        head, channels = config.vision_head_config, config.vision_config.latent_channels
        size, eps = head.hidden_size, head.layer_norm_eps
        self.head_dim = size // head.num_attention_heads
        self.time_embedding = TimestepEmbedding(size)
        self.in_norm = nn.LayerNorm(config.text_config.hidden_size, eps=eps)
        self.in_proj = nn.Linear(config.text_config.hidden_size, size)
        self.latent_proj = nn.Linear(channels, size) if head.use_latent_skip else None
        self.layers = nn.ModuleList([AdaLNZeroLayer(head) for _ in range(head.num_hidden_layers)])
        self.norm = nn.LayerNorm(size, eps=eps, elementwise_affine=False)
        self.modulation = ZeroLinear(size, 2 * size)
        self.out_proj = ZeroLinear(size, channels)

    def forward(self, hidden_states: Tensor, noisy_tokens: Tensor, sigma: Tensor, grids: Sequence[Grid]) -> Tensor:
        """`hidden_states` are rows of images with `grids`, see `grid.py`, at `sigma` (num_images,); the velocity is fp32.

        `noisy_tokens` (B, N, C) are used only with the latent skip.
        """
        condition = in_rows(nn.functional.silu(self.time_embedding(sigma)), grids)  # (B, 1, D)
        hidden_states = self.in_proj(self.in_norm(hidden_states))  # (B, N, D)
        if self.latent_proj is not None:
            hidden_states = hidden_states + self.latent_proj(noisy_tokens.to(hidden_states.dtype))
        rotary = rotary_positions_2d(grids, self.head_dim, hidden_states)
        varlen = varlen_arguments([num_tokens(grid) for grid in grids], hidden_states.device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, condition, rotary, **varlen)  # (B, N, D)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.out_proj(modulate(self.norm(hidden_states), shift, scale)).to(torch.float32)
