"""Images to be edited, at the size of what they become. HYDRA-X, section 3."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from ..modeling.grid import Grid, image_grids
from ..modeling.image_processing_hydra import HydraImageProcessor, center_crop, upright
from ..modeling.processing_hydra import HydraProcessor


MAX_SOURCES = 16


@dataclass
class Sources:
    """The given images of some prompts, as many for each of them.

    Args:
        pixel_values, grid_thw: packed, prompt by prompt, see `HydraModel.forward`.
        size: height and width of the edited images, in pixels.
    """

    pixel_values: Tensor
    grid_thw: Tensor
    size: tuple[int, int]

    def grids_of(self, prompt: int, num_prompts: int) -> list[Grid]:
        """The grids of the images of one prompt."""
        grids = image_grids(self.grid_thw)
        count = len(grids) // num_prompts
        return grids[prompt * count : (prompt + 1) * count]


def nested_sources(image, num_prompts: int) -> list[list]:
    """The images of each prompt: one image for all, one or a list for each of several, or a list for a single prompt.

    Raises ValueError for another number.
    """
    images = list(image) if isinstance(image, list | tuple) else [image] * num_prompts
    if num_prompts == 1 and not any(isinstance(each, list | tuple) for each in images):
        images = [images]
    images = [list(each) if isinstance(each, list | tuple) else [each] for each in images]
    counts = sorted({len(each) for each in images})
    if len(images) != num_prompts or counts[0] < 1 or len(counts) > 1 or counts[-1] > MAX_SOURCES:
        raise ValueError(
            f"Got image with {[len(each) for each in images]} images for {num_prompts} prompts, expected as many for each of them,"
            f" at most {MAX_SOURCES}."
        )
    return images


def encode_sources(
    processor: HydraProcessor, image, num_prompts: int, height: int | None = None, width: int | None = None
) -> Sources:
    """The images of each prompt as pixels. The last one is cropped and resized to the edited image's size, as in training; those
    before it are seen whole.

    Args:
        image: see `nested_sources`; of any kind that `HydraImageProcessor` reads.
        height, width: None is the size for the first prompt's last image.

    Raises ValueError for what is not an image, and for edited images of several sizes.
    """
    nested = [
        [as_pil(processor.image_processor, each) for each in images] for images in nested_sources(image, num_prompts)
    ]
    sizes = {
        (height or own_height, width or own_width)
        for own_height, own_width in (
            processor.image_processor.generated_size(images[-1].height, images[-1].width) for images in nested
        )
    }
    if len(sizes) > 1:
        raise ValueError(f"Got images for edits of the sizes {sorted(sizes)}, expected one: give height and width.")
    size, parts = sizes.pop(), []
    for *references, source in nested:
        parts += [processor.image_processor(each, return_tensors="pt") for each in references]
        parts.append(_at_size(processor.image_processor, source, size))
    packed = {name: torch.cat([part[name] for part in parts]) for name in ("pixel_values", "image_grid_thw")}
    return Sources(packed["pixel_values"], packed["image_grid_thw"], size)


def _at_size(image_processor: HydraImageProcessor, image: Image.Image, size: tuple[int, int]) -> BatchFeature:
    """The middle part of an image with the aspect ratio of `size`, at this size, as `generated_levels` in training."""
    part, (height, width) = center_crop(upright(image), *size), size
    return image_processor(part, size={"height": height, "width": width}, return_tensors="pt")


def as_pil(image_processor: HydraImageProcessor, image) -> Image.Image:
    """An image of any kind that the processor reads, as PIL's. Raises ValueError for anything else."""
    image = image_processor.fetch_images(image)
    if isinstance(image, Image.Image):
        return image
    if image.ndim != 3:
        raise ValueError(f"Got an image of shape {tuple(image.shape)}, expected 3 axes; a batch goes in as a list.")
    levels = image_processor.to_levels(image).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))
