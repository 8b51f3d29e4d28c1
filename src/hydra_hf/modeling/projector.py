"""From Sem-ViT to the language model: the projector. HYDRA, section 2.2."""

from collections.abc import Sequence

from torch import Tensor, nn

from .configuration_hydra import HydraConfig
from .grid import Grid, sinusoidal_positions_2d


class MultiModalProjector(nn.Module):
    """Semantic states to the width of the LLM: a norm, fixed positions if the config has them, the paper's linear layer."""

    def __init__(self, config: HydraConfig):
        super().__init__()
        self.position_period = config.projector_position_period
        self.norm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.vision_config.layer_norm_eps)
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, semantic_states: Tensor, grids: Sequence[Grid]) -> Tensor:
        """States (B, N, D), rows of images of `grids`, see `grid.py` -> (B, N, D_llm)."""
        states = self.norm(semantic_states)
        if self.position_period is not None:
            states = states + sinusoidal_positions_2d(grids, states.shape[-1], states, self.position_period)
        return self.linear(states)
