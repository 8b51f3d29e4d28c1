"""How much of an image survives the tokenizer."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hydra_hf.modeling import HydraTokModel

from .backbones import PooledFeatures
from .metrics import frechet_distance, psnr, ssim


@torch.no_grad()
def reconstruct(model: HydraTokModel, pixel_values: Tensor, seed: int = 0, batch_size: int = 64) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1], encoded to the mean of the posterior and decoded again, on the device of the originals."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        model.decode(model.encode(part.to(model.device)).latent, generator=generator).sample
        for part in pixel_values.split(batch_size)
    ]
    return torch.cat(parts).to(pixel_values)


def score_reconstructions(
    pairs: Iterable[tuple[Tensor, Tensor]],
    features: PooledFeatures | None = None,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, float]:
    """Mean `psnr` in dB and `ssim` of batches of images and their copies; with `features`, also `frechet/NAME` between the two.

    `gather` returns the rows of all processes, each of which has its own batches.
    """
    scores, pooled = {"psnr": [], "ssim": []}, ([], [])
    for originals, copies in pairs:
        scores["psnr"].append(psnr(originals, copies))
        scores["ssim"].append(ssim(originals, copies))
        if features is not None:
            for kept, pictures in zip(pooled, (originals, copies)):
                kept.append(features(pictures))
    means = {name: gather(torch.cat(values)).mean().item() for name, values in scores.items()}
    if features is None:
        return means
    return {**means, f"frechet/{features.name}": frechet_distance(*(gather(torch.cat(kept)) for kept in pooled))}


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
