"""Distances between images, and between sets of images."""

import torch
from torch import Tensor, nn


def to_8_bits(pixel_values: Tensor) -> Tensor:
    """Pixels near [-1, 1] as they are shown: fp32 in [0, 1], in steps of 1 / 255."""
    return ((pixel_values.float().clamp(-1, 1) + 1) * 127.5).round() / 255


def psnr(pixel_values: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair (B, 3, H, W) in [-1, 1], both rounded to 8 bits; (B,)."""
    _check_shapes(pixel_values, others)
    error = ((to_8_bits(pixel_values) - to_8_bits(others)) ** 2).flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp(min=1e-10))  # equal images: 100 dB


def ssim(pixel_values: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair (B, 3, H, W) in [-1, 1], both rounded to 8 bits; (B,), 1 is equal.

    As in scikit-image with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`: a Gaussian window of 11 pixels
    that stays inside the image, each channel alone. Raises ValueError if the shapes differ or a side is below 11.
    """
    _check_shapes(pixel_values, others)
    if min(pixel_values.shape[-2:]) < 11:
        raise ValueError(f"Images {tuple(pixel_values.shape)} must be at least 11 pixels high and wide for SSIM.")
    first, second = to_8_bits(pixel_values).flatten(0, 1)[:, None], to_8_bits(others).flatten(0, 1)[:, None]
    offsets = torch.arange(-5.0, 6.0, device=first.device)
    weights = torch.softmax(-(offsets**2) / (2 * 1.5**2), dim=0)  # a Gaussian that sums to 1

    def blur(x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, weights[None, None, :, None])
        return nn.functional.conv2d(x, weights[None, None, None, :])

    means = blur(first), blur(second)
    variances = blur(first**2) - means[0] ** 2, blur(second**2) - means[1] ** 2
    covariance = blur(first * second) - means[0] * means[1]
    luminance = (2 * means[0] * means[1] + 0.01**2) / (means[0] ** 2 + means[1] ** 2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances[0] + variances[1] + 0.03**2)
    return (luminance * structure).unflatten(0, pixel_values.shape[:2]).flatten(1).mean(dim=1)


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two feature sets (n, d) and (m, d), in fp64.

    It is FID only for Inception features under FID's protocol; report the backbone with it. With n <= d the covariance is
    singular and the distance too large. Raises ValueError if ranks or widths differ, or there are fewer than two features.
    """
    if features.ndim != 2 or others.ndim != 2 or features.shape[1] != others.shape[1]:
        raise ValueError(f"Features {tuple(features.shape)} and {tuple(others.shape)} must be (n, d) and (m, d).")
    if min(len(features), len(others)) < 2:
        raise ValueError(f"{len(features)} and {len(others)} features: a covariance needs at least two.")
    first, second = features.double(), others.double()
    root = _matrix_root(first.T.cov())
    cross = torch.linalg.eigvalsh(root @ second.T.cov() @ root).clamp(min=0).sqrt().sum()
    distance = ((first.mean(0) - second.mean(0)) ** 2).sum() + first.var(0).sum() + second.var(0).sum() - 2 * cross
    return distance.item()


def _matrix_root(matrix: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix (d, d)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _check_shapes(pixel_values: Tensor, others: Tensor) -> None:
    if pixel_values.shape != others.shape:
        raise ValueError(f"Images {tuple(pixel_values.shape)} and {tuple(others.shape)} must have the same shape.")
