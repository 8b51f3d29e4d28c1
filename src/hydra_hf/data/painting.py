"""Images that are painted from a given one: the same part of both, pixel for pixel. UniMRG, section 3.1."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import PILImageResampling

from hydra_hf.modeling import HydraImageProcessor
from hydra_hf.modeling.grid import unpack_images
from hydra_hf.modeling.image_processing_hydra import WHITE, center_crop, pil_to_levels, whole_size


MANIFEST = "manifest.json"
PROMPT_COLUMN = "prompt"  # of a record: the prompt that was chosen for it


# Files of targets


def path_below(value: object, image_root: Path) -> str | None:
    """The path of a record's image relative to `image_root`; None if it is not a path below it."""
    value = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
    if not isinstance(value, str) or "://" in value or value.startswith("data:"):
        return None
    path = os.path.relpath(os.path.join(image_root, value), image_root)
    return None if path.split(os.sep)[0] == os.pardir else path


def target_paths(path: str) -> tuple[str, ...]:
    """Where the target of the image `path` may be: under the same relative path, or as PNG or JPEG of this stem."""
    stem = os.path.splitext(path)[0]
    return path, f"{stem}.png", f"{stem}.jpg"


def target_columns(name: str) -> tuple[str, ...]:
    """Where a record that holds its image may hold the target: a column, or a member `KEY.depth.png` of a tar."""
    return name, f"{name}.png", f"{name}.jpg"


def without_target(paths: Iterator[str], targets: Path) -> list[str]:
    """The images that have no target below the folder `targets`, each folder of which is listed once."""
    listed: dict[str, set[str]] = {}
    missing = []
    for path in dict.fromkeys(paths):
        folder = os.path.join(targets, os.path.dirname(path))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if not any(os.path.basename(target) in listed[folder] for target in target_paths(path)):
            missing.append(path)
    return missing


def known_failures(targets: Path) -> dict[str, str]:
    """Image -> reason, for the images of which `hydra prepare unimrg` could make no target in the folder `targets`."""
    manifest = read_manifest(targets.parent)
    return manifest.get(targets.name, {}).get("failures", {})


def read_manifest(folder: Path) -> dict:
    """The manifest that `hydra prepare unimrg` wrote to `folder`, {} if there is none. Raises ValueError for a damaged one."""
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not what `hydra prepare unimrg` writes: {error}.") from error


# Pixels


def shows_the_same(image: Image.Image, target: Image.Image) -> bool:
    """Whether one is the other in another size: their aspect ratios differ by no more than a rounded pixel."""
    return abs(image.width * target.height - image.height * target.width) <= image.width + image.height


def condition_size(height: int, width: int, patch_size: int, condition_image_size: int | None) -> tuple[int, int]:
    """The size of the given image next to a painted one of `height` x `width`: at most as many pixels as a square of side
    `condition_image_size`, in the nearest aspect ratio that patches allow."""
    if condition_image_size is None:
        return height, width
    return whole_size(height, width, patch_size, min_pixels=patch_size**2, max_pixels=condition_image_size**2)


def resized_pixels(
    image: Image.Image, height: int, width: int, image_processor: HydraImageProcessor, **kwargs
) -> Tensor:
    """The image resized to `height` x `width`, (3, H, W) in [-1, 1]."""
    processed = image_processor(image, size={"height": height, "width": width}, return_tensors="pt", **kwargs)
    return unpack_images(processed["pixel_values"], processed["image_grid_thw"], image_processor.patch_size)[0]


def picture_pixels(image: Image.Image, height: int, width: int, image_processor: HydraImageProcessor) -> Tensor:
    """The image itself, its middle part resized, (3, H, W) in [-1, 1]."""
    return resized_pixels(center_crop(image, height, width), height, width, image_processor)


def depth_pixels(depth: Image.Image, height: int, width: int, image_processor: HydraImageProcessor) -> Tensor:
    """Nearness from -1 (farthest in this part) to 1, three equal channels (3, H, W); -1 where all is equally far.

    As in the paper's code: bilinear, the first channel, and the range is stretched again after the resize.
    """
    pixels = resized_pixels(
        center_crop(depth, height, width), height, width, image_processor, resample=PILImageResampling.BILINEAR
    )[:1]
    low, high = pixels.aminmax()
    if high - low < 1 / WHITE:  # less than a level
        return torch.full((3, height, width), -1.0)
    return ((pixels - low) / (high - low) * 2 - 1).expand(3, -1, -1)


def boundary_pixels(lines: Image.Image, height: int, width: int, image_processor: HydraImageProcessor) -> Tensor:
    """White lines (1) on black (-1), three equal channels (3, H, W).

    A pixel is as white as the whitest that it covers, so a line of one pixel stays whole and white at any smaller size
    (our choice: the paper's code takes the nearest pixel, which tears lines). When enlarging, the nearest pixel counts.
    """
    levels = pil_to_levels(center_crop(lines, height, width)).amax(0)[None, None].float()  # (1, 1, H, W)
    if levels.shape[-2] >= height and levels.shape[-1] >= width:
        levels = torch.nn.functional.adaptive_max_pool2d(levels, (height, width))
    else:
        levels = torch.nn.functional.interpolate(levels, (height, width), mode="nearest-exact")
    return (levels[0] * (2 / WHITE) - 1).expand(3, -1, -1)
