"""Grids of pictures for people to look at."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def make_grid(pixel_values: Tensor, num_columns: int, margin: int = 2) -> Image.Image:
    """Pictures (B, 3, H, W) in [-1, 1], row by row."""
    pixels = ((pixel_values.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = pixels.shape
    num_rows = -(-count // num_columns)
    grid = np.full((num_rows * (height + margin) + margin, num_columns * (width + margin) + margin, 3), 128, np.uint8)
    for index, picture in enumerate(pixels):
        top = margin + index // num_columns * (height + margin)
        left = margin + index % num_columns * (width + margin)
        grid[top : top + height, left : left + width] = picture
    return Image.fromarray(grid)


def save_grid(pixel_values: Tensor, path: Path, num_columns: int) -> None:
    """`make_grid` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_grid(pixel_values, num_columns).save(path)
