"""Generation-semantic bottleneck (GSB). HYDRA, section 3.2, eq. 2-4."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput


@dataclass
class BottleneckOutput(ModelOutput):
    """`mean` and `logvar` (B, N, C) of the posterior; `hidden_states` (B, N, D) is the mean unprojected for Sem-ViT."""

    mean: Tensor | None = None
    logvar: Tensor | None = None
    hidden_states: Tensor | None = None


class Bottleneck(nn.Module):
    """D -> 2C -> a Gaussian per token -> D, with the statistics that normalise its latents.

    Sem-ViT reads the mean (deterministic), the decoder a sample; each has its own unprojection (our choice), so that
    later stages can train one and leave the other unchanged.
    """

    def __init__(self, config):
        super().__init__()
        decoder_size = config.hidden_size if config.decoder_config is None else config.decoder_config.hidden_size
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.use_bottleneck_layernorm
            else nn.Identity()
        )
        self.down_proj = nn.Linear(config.hidden_size, 2 * config.latent_channels)
        self.semantic_up_proj = nn.Linear(config.latent_channels, config.hidden_size)
        self.decoder_up_proj = nn.Linear(config.latent_channels, decoder_size)
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latents_std", torch.ones(config.latent_channels))

    def init_statistics(self) -> None:
        """Makes the normalisation the identity, until `set_latents_statistics` is called."""
        init.zeros_(self.latents_mean)
        init.ones_(self.latents_std)

    def forward(self, hidden_states: Tensor) -> BottleneckOutput:
        """`hidden_states` (B, N, D) of Gen-ViT."""
        mean, logvar = self.down_proj(self.norm(hidden_states)).chunk(2, dim=-1)  # mu, rho in eq. 2
        return BottleneckOutput(
            mean=mean,
            logvar=logvar.clamp(-30, 20),
            hidden_states=self.semantic_up_proj(mean),  # eq. 4
        )

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents (B, N, C) with zero mean and unit variance in each channel, as the flow reads them."""
        return (latents - self.latents_mean) / self.latents_std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return latents * self.latents_std + self.latents_mean


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = mu + eps exp(rho / 2), eq. 3."""
    return mean + noise * torch.exp(0.5 * logvar)
