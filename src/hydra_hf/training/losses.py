"""The losses, each under the key it is weighted by and logged as. HYDRA, section 3.3."""

from torch import Tensor, nn

from hydra_hf.modeling.modeling_hydra_tok import HydraTokForPreTrainingOutput


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """L_KL against a standard normal, eq. 5: summed over the channels, mean over tokens and batch."""
    mean, logvar = mean.float(), logvar.float()
    return -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()


def cosine_loss(states: Tensor, targets: Tensor) -> Tensor:
    """1 - cos of two states (B, N, D), mean over tokens: L_cos, eq. 6, and L_dist of one layer."""
    return 1 - nn.functional.cosine_similarity(states.float(), targets.float(), dim=-1).mean()


def tokenizer_losses(outputs: HydraTokForPreTrainingOutput, pixel_values: Tensor) -> dict[str, Tensor]:
    """Every loss that the outputs allow, by its key."""
    losses = {
        "kl": kl_loss(outputs.mean, outputs.logvar),
        "cosine": cosine_loss(outputs.bottleneck_states, outputs.gen_states.detach()),
    }
    if outputs.velocity is not None:
        losses["flow"] = nn.functional.mse_loss(outputs.velocity, outputs.velocity_target)
    else:
        difference = outputs.clean_pixel_values - pixel_values
        losses["regression"] = (difference**2).mean() + 0.5 * difference.abs().mean()  # our choice: L2 + L1 / 2
    return losses


def weighted_sum(losses: dict[str, Tensor], weights) -> Tensor:
    """The loss to minimise: each term times the weight of its name."""
    return sum(getattr(weights, name) * value for name, value in losses.items())
