"""Statistics of the latents of a vision tower, with which `encode` and `decode` normalise."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hydra_hf.modeling import HydraTokModel
from hydra_hf.modeling.grid import latents_to_tokens


@torch.no_grad()
def measure_latents(
    model: HydraTokModel, batches: Iterator[Tensor], add_up: Callable[[Tensor], Tensor] = lambda sums: sums
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of sampled latents, exact in the sampling noise, so that a dead channel keeps unit noise.

    `add_up` adds up the sums, in fp64, of all processes, each of which has its own batches.
    """
    sums = torch.zeros(3, model.config.latent_channels, dtype=torch.float64)  # of ones, means and squares
    for pixel_values in batches:
        latent_dist = model.encode(pixel_values.to(model.device)).latent_dist
        mean, var = (
            latents_to_tokens(value).flatten(0, 1).double().cpu() for value in (latent_dist.mean, latent_dist.var)
        )
        sums += torch.stack([torch.ones_like(mean).sum(0), mean.sum(0), (mean**2 + var).sum(0)])
    count, total, squares = add_up(sums)
    mean = total / count
    std = (squares / count - mean**2).sqrt()
    # encode() has normalised by the old statistics, which is undone here.
    old_mean, old_std = model.bottleneck.latents_mean.cpu(), model.bottleneck.latents_std.cpu()
    return (mean * old_std + old_mean).float(), (std * old_std).float()
