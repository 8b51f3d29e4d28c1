"""The losses, each under the key it is weighted by and logged as. HYDRA, section 3.3."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hydra_hf.modeling import HydraTokConfig, HydraTokForPreTraining, PixelFlowDecoderConfig
from hydra_hf.modeling.grid import Grid, folded_length, num_tokens
from hydra_hf.modeling.outputs import HydraTokForPreTrainingOutput

from .recipe import TokenizerLossWeights, TokenizerStage


MAX_CLASS_TOKENS = 8  # class token and registers that a ViT may have in front of its patches


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """L_KL of (B, N, C) against a standard normal, eq. 5: summed over channels, mean over tokens and batch."""
    mean, logvar = mean.float(), logvar.float()
    return -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()


def cosine_loss(states: Tensor, targets: Tensor) -> Tensor:
    """1 - cos of states (B, N, D), mean over tokens: L_cos, eq. 6, and L_dist of one layer."""
    return 1 - nn.functional.cosine_similarity(states.float(), targets.float(), dim=-1).mean()


def distill_loss(
    states: Sequence[Tensor], targets: Sequence[Tensor], grid: Grid, teacher_grid: Grid | None = None
) -> Tensor:
    """L_dist: the sum over layers of 1 - cos between student and teacher (B, cls + N, D), only on patches.

    Args:
        grid, teacher_grid: (t, h, w) of the student's patches and of the teacher's, to which the student's are resized; None
            is the same.

    Raises ValueError for a teacher of another width, or states that are not of these grids.
    """
    total, teacher_grid = 0.0, teacher_grid or grid
    for state, target in zip(states, targets, strict=True):
        state = resize_states(patch_states(state, num_tokens(grid)), grid, teacher_grid)
        target = patch_states(target, num_tokens(teacher_grid))
        if state.shape != target.shape:
            raise ValueError(
                f"The teacher's states {tuple(target.shape)} must have the shape of the student's, {tuple(state.shape)}."
            )
        total = total + cosine_loss(state, target)
    return total


def patch_states(states: Tensor, num_patches: int) -> Tensor:
    """States (B, cls + N, D) -> (B, N, D). Raises ValueError if the number of other tokens cannot be class tokens."""
    if not 0 <= states.shape[1] - num_patches <= MAX_CLASS_TOKENS:
        raise ValueError(f"A layer has {states.shape[1]} tokens for {num_patches} patches.")
    return states[:, states.shape[1] - num_patches :]


def resize_states(states: Tensor, grid: Grid, target_grid: Grid) -> Tensor:
    """States (B, N, D) of a (t, h, w) grid on another one: means of successive frames, and bilinear in space.

    Raises ValueError if the frames do not divide evenly.
    """
    if grid == target_grid:
        return states
    num_frames, *size = target_grid
    if grid[0] % num_frames:
        raise ValueError(f"{grid[0]} frames of the student cannot be averaged to {num_frames} of the teacher.")
    frames = states.float().unflatten(1, (num_frames, -1, *grid[1:])).mean(2)  # (B, t, h, w, D)
    maps = frames.flatten(0, 1).permute(0, 3, 1, 2)
    maps = nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2).unflatten(0, (len(states), num_frames)).flatten(1, 2)


def frames_of(pixel_values: Tensor) -> Tensor:
    """The frames (B T, 3, H, W) of clips (B, 3, T, H, W), clip by clip; images as they are."""
    return pixel_values.transpose(1, 2).flatten(0, 1) if pixel_values.ndim == 5 else pixel_values


def tokenizer_losses(
    outputs: HydraTokForPreTrainingOutput, pixel_values: Tensor, weights: TokenizerLossWeights
) -> dict[str, Tensor]:
    """The losses that need no judge, by key; those of weight 0 are not computed."""
    losses = {}
    if weights.kl > 0:
        losses["kl"] = kl_loss(outputs.mean, outputs.logvar)
    if weights.cosine > 0:
        losses["cosine"] = cosine_loss(outputs.bottleneck_states, outputs.gen_states.detach())
    if outputs.velocity is not None and weights.flow > 0:
        losses["flow"] = nn.functional.mse_loss(outputs.velocity, outputs.velocity_target)  # L_FM
    elif outputs.velocity is None and weights.regression > 0:
        difference = outputs.clean_pixel_values - pixel_values
        losses["regression"] = (difference**2).mean() + 0.5 * difference.abs().mean()  # our choice: L2 + L1 / 2
    return losses


def training_inputs(
    config: HydraTokConfig, num_images: int, num_frames: int | None = None, size: int | None = None
) -> dict[str, Tensor]:
    """Inputs of `HydraTokForPreTraining` without contents: pixels, and the noise of latents and decoder.

    Args:
        num_frames: frames of each of as many clips; None for images.
        size: side of the images; None is the config's.
    """
    size, num_latent_frames = size or config.image_size, 1
    frames = () if num_frames is None else (num_frames,)
    if num_frames is not None:
        num_latent_frames = folded_length(num_frames, config.temporal_compression_ratio)
    num_latents = num_latent_frames * (size // config.patch_size) ** 2
    inputs = {
        "pixel_values": torch.empty(num_images, config.num_channels, *frames, size, size),
        "latent_noise": torch.empty(num_images, num_latents, config.latent_channels),
    }
    if isinstance(config.decoder_config, PixelFlowDecoderConfig):
        inputs["pixel_noise"] = torch.empty(num_images, num_latents, config.num_channels * config.patch_size**2)
        inputs["sigma"] = torch.empty(num_images)
    return inputs


@torch.enable_grad()
def reached_parameters(model: HydraTokForPreTraining, stage: TokenizerStage) -> set[str]:
    """The names of the parameters that get a gradient from the stage's losses of images, found on torch's meta device; clips
    reach the same.

    DDP would wait forever for the others, such as layers of Sem-ViT after the last one that is distilled. Raises ValueError
    for a stage without losses.
    """
    weights = stage.loss_weights
    with torch.device("meta"):
        blank = HydraTokForPreTraining._from_config(
            model.config, attn_implementation="sdpa", video_teacher_size=stage.decompressed_size
        )
        inputs = training_inputs(model.config, 1)
    outputs = blank(**inputs, distill_layers=stage.compared_layers)
    judged = [*tokenizer_losses(outputs, inputs["pixel_values"], weights).values(), *outputs.hidden_states]
    if weights.video_distill > 0:
        judged.append(outputs.video_states)
    if weights.perceptual > 0 or weights.adversarial > 0:
        judged.append(outputs.clean_pixel_values)
    if not judged:
        raise ValueError(f"{stage.name} has no loss: {weights}.")
    names, parameters = zip(*blank.named_parameters())
    gradients = torch.autograd.grad(sum(value.mean() for value in judged), parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients) if gradient is not None}


def weighted_sum(losses: dict[str, Tensor], weights) -> Tensor:
    """The loss to minimise: each term times the weight of its name."""
    return sum(getattr(weights, name) * value for name, value in losses.items())
