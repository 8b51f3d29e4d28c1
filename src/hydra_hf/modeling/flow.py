"""Rectified flow between data and noise. HYDRA, sections 3.2 and 2.2: x_t = (1 - t) x + t eps, v = eps - x.

`sigma` is the paper's t: 0 is data, 1 is noise. This is the only file that knows time's direction.
"""

import torch
from torch import Tensor


def expand_sigma(sigma: Tensor, like: Tensor) -> Tensor:
    """`sigma` (B,) with as many trailing axes as `like`, so that it broadcasts over each sample."""
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Data at noise level `sigma` (B,), x_t = (1 - t) x + t eps; at 0 it is the data itself, at 1 the noise."""
    sigma = expand_sigma(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """The direction from data to noise, eps - x, which the network learns."""
    return noise - clean


def flow_matching_loss(velocity: Tensor | None, target: Tensor) -> Tensor:
    """L_FM: the mean squared error of a velocity. Raises ValueError for another shape, or if there is no velocity."""
    if velocity is None or velocity.shape != target.shape:
        shape = None if velocity is None else tuple(velocity.shape)
        raise ValueError(
            f"velocity_target {tuple(target.shape)} needs is_generated and the shape of the velocity, got {shape}."
        )
    return torch.nn.functional.mse_loss(velocity, target.to(velocity))


def predict_clean(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The data that a velocity points back to, x_t - t v: what LPIPS and the GAN judge."""
    return noisy - expand_sigma(sigma, noisy) * velocity


def velocity_from_clean(noisy: Tensor, clean: Tensor, sigma: Tensor, min_sigma: float = 0.05) -> Tensor:
    """The velocity from an estimate of the data to `noisy`, (x_t - x) / t; `min_sigma` bounds the division."""
    return (noisy - clean) / expand_sigma(sigma, noisy).clamp(min=min_sigma)


def euler_step(noisy: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One step along the velocity, from `sigma` to the smaller `next_sigma`, which are scalars or broadcast over `noisy`."""
    return noisy + (next_sigma - sigma) * velocity


def sde_step(
    noisy: Tensor, velocity: Tensor, sigma: float | Tensor, next_sigma: float | Tensor, noise_rate: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one step along an SDE that has the flow's distribution at every noise level.

    dx = [v + g^2 / (2 t) (x + (1 - t) v)] dt + g dw, backwards in time (Flow-GRPO, Liu et al. 2025, arXiv 2505.05470,
    after Song et al. 2021, arXiv 2011.13456); `noise_rate` is g, and x + (1 - t) v is the noise that the velocity points to. The
    levels are scalars or broadcast over `noisy`; with `noise_rate` 0 the mean is `euler_step`.
    """
    drift = velocity + noise_rate**2 / (2 * sigma) * (noisy + (1 - sigma) * velocity)
    return noisy + (next_sigma - sigma) * drift, noise_rate * (sigma - next_sigma) ** 0.5


def shift_sigma(sigma: Tensor, shift: float | Tensor) -> Tensor:
    """Noise levels moved towards noise (shift > 1), s t / (1 + (s - 1) t), the same in training and in sampling."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: Tensor, shift: float | Tensor) -> Tensor:
    """The inverse of `shift_sigma`: noise levels before they were moved."""
    return sigma / (shift - (shift - 1) * sigma)


def resolution_shift(num_values: int) -> float:
    """The shift that fits a latent of `num_values` numbers: sqrt(N C / 4096), between 3 and 8 (our choice, after RAE).

    Where things are is decided at high noise, however few the tokens: with a shift of 1, the toy world's places are not learnt.
    """
    return min(max((num_values / 4096) ** 0.5, 3.0), 8.0)


def sample_sigma(
    num_samples: int, *, shift: float = 1.0, logit_std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Logit-normal noise levels (num_samples,) in (0, 1), shifted (our choice, after SD3)."""
    return shift_sigma(torch.sigmoid(logit_std * torch.randn(num_samples, generator=generator)), shift)


def inference_sigmas(num_inference_steps: int, shift: float = 1.0) -> Tensor:
    """The noise levels at which a sampler evaluates, from 1 down; the step from the last one ends at 0.

    The scheduler's own default spends its last step on 0.001, so pipelines pass these. Raises ValueError below one step.
    """
    if num_inference_steps < 1:
        raise ValueError(f"{num_inference_steps=} must be at least 1.")
    return shift_sigma(torch.linspace(1, 1 / num_inference_steps, num_inference_steps), shift)
