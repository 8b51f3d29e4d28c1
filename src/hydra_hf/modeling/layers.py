"""The parts that the ViT, the decoders and the vision head are built from."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class ZeroLinear(nn.Linear):
    """A projection that starts at zero, so that its block starts as the identity (AdaLN-Zero)."""


class LayerScale(nn.Module):
    """A learned factor per channel, as in InternViT."""

    def __init__(self, hidden_size: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.weight = nn.Parameter(torch.full((hidden_size,), float(init_value)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return hidden_states * self.weight


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, computed in the type of the weight: under autocast on a CPU, torch's warns of bf16 inputs and an fp32
    weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the type of the input."""
        return super().forward(hidden_states.to(self.weight.dtype)).to(hidden_states.dtype)


def init_layer(module: nn.Module, std: float) -> None:
    """Initialises the layers of this file, for the `_init_weights` of the models that use them."""
    if isinstance(module, ZeroLinear):
        init.zeros_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.Linear | nn.Conv2d):
        init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if module.weight is not None:
            init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, LayerScale):
        init.constant_(module.weight, module.init_value)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, **kwargs,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention written out; the other implementations are transformers' own."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ViTAttention(nn.Module):
    """Bidirectional multi-head attention over all tokens; with `qk_norm` queries and keys are RMS-normalised.

    In clips `frames` says which frames see each other, see `temporal.py`.
    """

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config, qk_norm: bool = False):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, eps=config.layer_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=config.layer_norm_eps) if qk_norm else nn.Identity()

    def forward(
        self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor] | None = None, frames: Callable | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(B, N, D) -> (B, N, D), and the attention weights if the implementation returns them; `rotary` as from `rotary_positions_2d`."""
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)  # (B, heads, N, head_dim)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attend = partial(
            attention, self, attention_mask=None, dropout=self.dropout if self.training else 0.0, scaling=self.scaling,
            is_causal=False, **kwargs,
        )  # fmt: skip
        output, weights = attend(query, key, value) if frames is None else frames(attend, self, query, key, value)
        return self.out_proj(output.reshape(hidden_states.shape)), weights


class MLP(nn.Module):
    """Two linear layers with an activation between them, (B, N, D) -> (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class ViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer; with layer scale it is InternViT's, without it SigLIP's."""

    def __init__(self, config):
        super().__init__()
        scaled = config.layer_scale_init_value is not None
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.scale_1 = LayerScale(config.hidden_size, config.layer_scale_init_value) if scaled else nn.Identity()
        self.scale_2 = LayerScale(config.hidden_size, config.layer_scale_init_value) if scaled else nn.Identity()

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.scale_1(attended)
        return hidden_states + self.scale_2(self.mlp(self.layernorm_after(hidden_states)))


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN's modulation of (B, N, D); shift and scale broadcast over it."""
    return hidden_states * (1 + scale) + shift


class AdaLNZeroLayer(GradientCheckpointingLayer):
    """Transformer layer whose norms and branches are modulated by the noise level; it starts as the identity."""

    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.attention = ViTAttention(config, qk_norm=True)
        self.norm_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.mlp = MLP(config)
        self.modulation = ZeroLinear(config.hidden_size, 6 * config.hidden_size)

    def forward(self, hidden_states: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor], **kwargs) -> Tensor:
        """`hidden_states` (B, N, D), `condition` (B, 1, D), or (1, N, D) if a row holds several images."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, dim=-1)
        attended, _ = self.attention(modulate(self.norm_1(hidden_states), shift_1, scale_1), rotary=rotary, **kwargs)
        hidden_states = hidden_states + gate_1 * attended
        return hidden_states + gate_2 * self.mlp(modulate(self.norm_2(hidden_states), shift_2, scale_2))


class TimestepEmbedding(nn.Module):
    """A noise level as a vector: sinusoids of 1000 sigma, then an MLP."""

    num_frequencies = 256

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(self.num_frequencies, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, sigma: Tensor) -> Tensor:
        """`sigma` (B,) in [0, 1] -> (B, D)."""
        half = self.num_frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = 1000 * sigma.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(nn.functional.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, heads, N, head_dim) rotated by their positions."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def first_set(mask: Tensor, number: int) -> Tensor:
    """The positions (number,) of the first `number` True of `mask` (L,), in order. Indexing by a mask could not be compiled."""
    return mask.int().argsort(descending=True, stable=True)[:number]


def scale_gradient(x: Tensor, scale: float | Tensor) -> Tensor:
    """`x` itself; its gradient is multiplied by `scale`."""
    return x.detach() + scale * (x - x.detach())
