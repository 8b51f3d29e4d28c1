"""The losses, each under the key it is weighted by and logged as. HYDRA, section 3.3."""

from collections.abc import Sequence

from torch import Tensor, nn

from hydra_hf.modeling.modeling_hydra_tok import HydraTokForPreTrainingOutput

from .recipe import TokenizerLossWeights


MAX_CLASS_TOKENS = 8  # class token and registers that a ViT may carry in front of its patches


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """L_KL against a standard normal, eq. 5: summed over the channels, mean over tokens and batch."""
    mean, logvar = mean.float(), logvar.float()
    return -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()


def cosine_loss(states: Tensor, targets: Tensor) -> Tensor:
    """1 - cos of two states (B, N, D), mean over tokens: L_cos, eq. 6, and L_dist of one layer."""
    return 1 - nn.functional.cosine_similarity(states.float(), targets.float(), dim=-1).mean()


def distill_loss(states: Sequence[Tensor], targets: Sequence[Tensor], num_tokens: int) -> Tensor:
    """L_dist: the sum over layers of 1 - cos between student and teacher (B, cls + N, D) on the patches alone.

    Raises ValueError for a teacher of another width or another number of patches.
    """
    total = 0.0
    for state, target in zip(states, targets, strict=True):
        state, target = patch_states(state, num_tokens), patch_states(target, num_tokens)
        if state.shape != target.shape:
            raise ValueError(
                f"The teacher's states {tuple(target.shape)} must be as the student's {tuple(state.shape)}."
            )
        total = total + cosine_loss(state, target)
    return total


def patch_states(states: Tensor, num_tokens: int) -> Tensor:
    """States (B, cls + N, D) -> (B, N, D). Raises ValueError if what is left over cannot be class tokens."""
    if not 0 <= states.shape[1] - num_tokens <= MAX_CLASS_TOKENS:
        raise ValueError(f"A layer has {states.shape[1]} tokens for an image of {num_tokens} patches.")
    return states[:, states.shape[1] - num_tokens :]


def tokenizer_losses(
    outputs: HydraTokForPreTrainingOutput, pixel_values: Tensor, weights: TokenizerLossWeights
) -> dict[str, Tensor]:
    """The losses that need no judge, by key; one of weight 0 is not computed."""
    losses = {}
    if weights.kl > 0:
        losses["kl"] = kl_loss(outputs.mean, outputs.logvar)
    if weights.cosine > 0:
        losses["cosine"] = cosine_loss(outputs.bottleneck_states, outputs.gen_states.detach())
    if outputs.velocity is not None and weights.flow > 0:
        losses["flow"] = nn.functional.mse_loss(outputs.velocity, outputs.velocity_target)
    elif outputs.velocity is None and weights.regression > 0:
        difference = outputs.clean_pixel_values - pixel_values
        losses["regression"] = (difference**2).mean() + 0.5 * difference.abs().mean()  # our choice: L2 + L1 / 2
    return losses


def weighted_sum(losses: dict[str, Tensor], weights) -> Tensor:
    """The loss to minimise: each term times the weight of its name."""
    return sum(getattr(weights, name) * value for name, value in losses.items())
