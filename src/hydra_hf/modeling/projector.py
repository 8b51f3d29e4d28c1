"""From Sem-ViT to the language model: the projector. HYDRA, section 2.2."""

from torch import Tensor, nn

from .configuration_hydra import HydraConfig


class MultiModalProjector(nn.Module):
    """Semantic states to the width of the LLM: a norm and the paper's linear layer."""

    def __init__(self, config: HydraConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.vision_config.layer_norm_eps)
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, semantic_states: Tensor) -> Tensor:
        """States (B, N, D) -> (B, N, D_llm), without positions, which Sem-ViT has added."""
        return self.linear(self.norm(semantic_states))
