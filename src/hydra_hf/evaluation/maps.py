"""How well a painted depth map or the painted boundaries of objects fit the truth. UniMRG, section 4.3."""

import torch
from torch import Tensor, nn

from .metrics import psnr


def foreground_of(depth: Tensor) -> Tensor:
    """Where a depth map (B, 3, H, W) in [-1, 1] has an object, (B, H, W): above the farthest quarter of the range."""
    return depth.mean(dim=1) > -0.5


def depth_similarity(depth: Tensor, truth: Tensor) -> Tensor:
    """The paper's score, 1 - mean absolute error, of maps (B, 3, H, W) in [-1, 1], read as [0, 1]; (B,). Even black scores
    high."""
    return 1 - (depth - truth).abs().flatten(1).mean(dim=1) / 2


def foreground_error(depth: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error in [0, 1] where the truth has an object, (B,)."""
    mask = foreground_of(truth).float()
    error = (depth - truth).abs().mean(dim=1) / 2
    return (error * mask).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1).clamp(min=1)


def intersection_over_union(mask: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks (B, H, W); (B,), 1 where both are empty."""
    both, either = (mask & truth).flatten(1).sum(dim=1), (mask | truth).flatten(1).sum(dim=1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def order_accuracy(depth: Tensor, objects: Tensor, distances: Tensor) -> tuple[int, int]:
    """How many pairs of objects at different distances a map (3, H, W) has in the right order, and how many pairs there are.

    Args:
        objects: (n, H, W) bool, one mask for each object.
        distances: (n,), larger is farther.
    """
    nearness = torch.stack([depth.mean(dim=0)[mask].mean() for mask in objects]) if len(objects) else distances
    is_nearer = distances[:, None] < distances[None]
    return int((is_nearer & (nearness[:, None] > nearness[None])).sum()), int(is_nearer.sum())


def boundary_f(boundaries: Tensor, truth: Tensor, tolerance: int | None = None) -> Tensor:
    """F measure of white lines on black (B, 3, H, W) in [-1, 1], (B,); 1 where both are empty.

    A pixel of a line counts if one of the other map is within `tolerance` pixels, by default .0075 of the diagonal, at least 1.
    """
    height, width = truth.shape[-2:]
    tolerance = max(1, round(0.0075 * (height**2 + width**2) ** 0.5)) if tolerance is None else tolerance
    lines, expected = (pixels.mean(dim=1) > 0 for pixels in (boundaries, truth))
    precision, recall = _share_near(lines, expected, tolerance), _share_near(expected, lines, tolerance)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-8)
    is_empty = ~(lines | expected).flatten(1).any(dim=1)
    return torch.where(is_empty, 1.0, score)


def white_share(boundaries: Tensor) -> Tensor:
    """The share of white pixels of maps (B, 3, H, W), (B,): 0 when a model has collapsed to black."""
    return (boundaries.mean(dim=1) > 0).float().flatten(1).mean(dim=1)


def map_scores(painted: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """All scores of images (B, 3, H, W) painted in the tasks `reconstruct`, `depth` and `segment`, each (B,)."""
    foreground, expected = foreground_of(painted["depth"]), foreground_of(truth["depth"])
    return {
        "psnr": psnr(painted["reconstruct"], truth["reconstruct"]),
        "depth_similarity": depth_similarity(painted["depth"], truth["depth"]),
        "foreground_error": foreground_error(painted["depth"], truth["depth"]),
        "foreground_iou": intersection_over_union(foreground, expected),
        "boundary_f": boundary_f(painted["segment"], truth["segment"]),
        "white_share": white_share(painted["segment"]),
    }


def _share_near(lines: Tensor, others: Tensor, tolerance: int) -> Tensor:
    """The share of the pixels of `lines` (B, H, W) that have one of `others` nearby, (B,)."""
    reach = nn.functional.max_pool2d(others.float()[:, None], 2 * tolerance + 1, stride=1, padding=tolerance)[:, 0] > 0
    return (lines & reach).flatten(1).sum(dim=1) / lines.flatten(1).sum(dim=1).clamp(min=1)
