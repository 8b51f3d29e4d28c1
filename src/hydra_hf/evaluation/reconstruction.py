"""How much of an image or a clip survives the tokenizer."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hydra_hf.modeling import HydraTokModel

from .metrics import frechet_distance, psnr, ssim, to_8_bits


def reconstruct(model: HydraTokModel, pixel_values: Tensor, seed: int = 0, batch_size: int = 64) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1], encoded to the mean of the posterior and decoded again, on the device of the originals."""
    return torch.cat([copies for _, copies in reconstruct_batches(model, pixel_values.split(batch_size), seed)])


@torch.no_grad()
def reconstruct_batches(
    model: HydraTokModel,
    batches: Iterable[Tensor],
    seed: int = 0,
    num_inference_steps: int | None = None,
    model_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Batches of images (B, 3, H, W) or clips (B, 3, T, H, W) in [-1, 1], each with its reconstruction from the mean of the posterior.

    Args:
        num_inference_steps: Euler steps of a flow decoder; None is the number in its config.
        model_size: the model sees images, which are square, at this size, resized to it and back; None is their own.
    """
    generator = torch.Generator().manual_seed(seed)
    for originals in batches:
        seen = originals if model_size is None else _resized(originals, model_size)
        latents = model.encode(seen.to(model.device, model.dtype)).latent
        copies = model.decode(latents, generator=generator, num_inference_steps=num_inference_steps).sample
        copies = copies.to(originals)
        yield originals, copies if model_size is None else _resized(copies.clamp(-1, 1), originals.shape[-1])


def _resized(pixel_values: Tensor, size: int) -> Tensor:
    """Square images (B, 3, H, W) at `size`, by bicubic interpolation without aliasing, clamped to [-1, 1]."""
    resized = torch.nn.functional.interpolate(pixel_values, size=(size, size), mode="bicubic", antialias=True)
    return resized.clamp(-1, 1)


def score_reconstructions(
    pairs: Iterable[tuple[Tensor, Tensor]],
    features: torch.nn.Module | None = None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    perceptual: torch.nn.Module | None = None,
) -> dict[str, float]:
    """
    Mean `psnr` in dB and `ssim` of batches of images, or of the frames of clips, and their copies.

    Args:
        features: of images or clips; the Frechet distance between those of originals and copies is the score `features.score`.
        gather: returns the rows of all processes, each of which has its own batches.
        perceptual: a distance between batches of images, the score `perceptual.score`.
    """
    scores, pooled = {"psnr": [], "ssim": []}, ([], [])
    if perceptual is not None:
        scores[perceptual.score] = []
    for originals, copies in pairs:
        frames = _frames(originals), _frames(copies)
        scores["psnr"].append(psnr(*frames))
        scores["ssim"].append(ssim(*frames))
        if perceptual is not None:
            shown = (2 * to_8_bits(pictures) - 1 for pictures in frames)
            scores[perceptual.score].append(perceptual(*shown).expand(len(frames[0])))
        if features is not None:
            for kept, pictures in zip(pooled, (originals, copies)):
                kept.append(features(pictures))
    means = {name: gather(torch.cat(values)).mean().item() for name, values in scores.items()}
    if features is None:
        return means
    return {**means, features.score: frechet_distance(*(gather(torch.cat(kept)) for kept in pooled))}


def _frames(pixel_values: Tensor) -> Tensor:
    """Images (B, 3, H, W), or all frames of clips (B, 3, T, H, W) as such."""
    return pixel_values.transpose(1, 2).flatten(0, 1) if pixel_values.ndim == 5 else pixel_values


def photo_crops(size: int) -> Tensor:
    """All whole tiles of `size` px of scikit-image's colour photographs, halved; (B, 3, size, size) in [-1, 1]."""
    import numpy as np  # with scikit-image: pip install hydra_hf[eval]
    from skimage import data

    tiles = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photo = torch.from_numpy(np.ascontiguousarray(getattr(data, name)())).permute(2, 0, 1)[None].float()
        photo = torch.nn.functional.avg_pool2d(photo, 2) / 127.5 - 1
        tiles.append(photo.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
    return torch.cat(tiles)
