"""Distances between pictures."""

import torch
from torch import Tensor


def psnr(pixel_values: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair (B, 3, H, W) in [-1, 1], both rounded to 8 bits; (B,)."""
    if pixel_values.shape != others.shape:
        raise ValueError(f"Pictures {tuple(pixel_values.shape)} and {tuple(others.shape)} must have one shape.")
    first, second = (((x.float().clamp(-1, 1) + 1) * 127.5).round() / 255 for x in (pixel_values, others))
    error = ((first - second) ** 2).flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp(min=1e-10))  # equal pictures: 100 dB
