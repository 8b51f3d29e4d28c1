"""What a model learns to paint: depth maps and boundaries of segments, made from its images by other models. UniMRG, 3.1."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hydra_hf.hub import check_model_name
from hydra_hf.modeling import HydraImageProcessor


MASK_SETTINGS = {  # the defaults of SAM's own mask generator, and the paper's
    "points_per_crop": 32, "points_per_batch": 64, "pred_iou_thresh": 0.88, "stability_score_thresh": 0.95,
    "crops_nms_thresh": 0.7,
}  # fmt: skip
MAX_SEGMENTED_SIDE = 2048  # the paper's code


class Painter(Protocol):
    """Makes the targets of one task; `settings` say what a target depends on besides its image."""

    name: str
    settings: dict[str, Any]

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the target of an image of `width` x `height`."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """The target of an upright RGB image. Raises ValueError if the model gives none."""


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Turns every error in loading a model into ValueError with its name."""
    check_model_name(model)
    try:
        yield
    except Exception as error:  # transformers raises nearly anything for the files of another model
        raise ValueError(f"The model {model} cannot be loaded: {error}") from error


# Depth


def depth_input_size(height: int, width: int, shortest: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The (height, width) that Depth-Anything resizes an image to: each side at least that of `shortest`, and a multiple."""
    scale = max(shortest[0] / height, shortest[1] / width)

    def fit(side: float, least: int) -> int:
        nearest = round(side / multiple) * multiple
        return nearest if nearest >= least else math.ceil(side / multiple) * multiple

    return fit(height * scale, shortest[0]), fit(width * scale, shortest[1])


class DepthPainter:
    """Nearness by a depth model, from black (farthest) to white over the whole image, in the image's size.

    An image is resized as in Depth-Anything's own code, and not as in transformers' pipeline: the short side at least the
    model's, cubic without antialiasing; back to the image's size with corners aligned. Distances (metric models) are inverted.

    Raises ValueError for a model that is neither Depth-Anything nor DPT: its depth may mean something else.
    """

    name = "depth"

    def __init__(self, model: str, device: torch.device | str):
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation

        with loading(model):
            self.kind = AutoConfig.from_pretrained(model).model_type
        if self.kind not in ("depth_anything", "dpt"):
            raise ValueError(f"The depth model {model} is of type {self.kind!r}, expected 'depth_anything' or 'dpt'.")
        with loading(model):
            self.model = AutoModelForDepthEstimation.from_pretrained(model, dtype=torch.float32).to(device).eval()
            self.image_processor = AutoImageProcessor.from_pretrained(model)
        self.settings = {"model": model}

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def __call__(self, image: Image.Image) -> Image.Image:
        levels = (self.nearness(image) * 255).to(torch.uint8).cpu().numpy()
        return Image.fromarray(levels).convert("RGB")

    @torch.inference_mode()
    def nearness(self, image: Image.Image) -> Tensor:
        """Nearness (H, W) from 0 to 1, in the size of the RGB image; 0 everywhere if all is equally far."""
        pixel_values = self._pixel_values(image).to(self.model.device)
        depth = self.model(pixel_values=pixel_values).predicted_depth[:, None]  # (1, 1, h, w)
        if self.kind == "depth_anything" and self.model.config.depth_estimation_type == "metric":
            depth = 1 / depth
        size = (image.height, image.width)
        depth = torch.nn.functional.interpolate(depth, size, mode="bilinear", align_corners=True)[0, 0]
        low, high = depth.aminmax()
        if not torch.isfinite(high - low):
            raise ValueError("a depth that is not finite")
        return (depth - low) / (high - low) if high - low > 1e-6 else torch.zeros_like(depth)

    def _pixel_values(self, image: Image.Image) -> Tensor:
        """The input (1, 3, h, w) of the model; that of a DPT is made by its own processor."""
        processor = self.image_processor
        if self.kind == "dpt":
            return processor(image, return_tensors="pt")["pixel_values"]
        shortest = (processor.size["height"], processor.size["width"])
        size = depth_input_size(image.height, image.width, shortest, processor.ensure_multiple_of)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic")  # OpenCV's cubic, up to rounding
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
        return (pixels - mean) / std


# Segments


def boundaries(instance_masks: Tensor) -> Tensor:
    """The pixels of each mask that touch one outside of it, also by a corner: (N, H, W) bool to (H, W) bool.

    The lines are one pixel wide, inside the masks; there is none along the border of the image.
    """
    outside = (~instance_masks).float()
    touches = torch.nn.functional.max_pool2d(outside[:, None], 3, stride=1, padding=1)[:, 0] > 0
    return (instance_masks & touches).any(0)


def draw_boundaries(masks: Iterable[Tensor], height: int, width: int, device: torch.device | str) -> Image.Image:
    """White lines around masks (H, W) of any size, on black, in an image of `height` x `width`."""
    lines = torch.zeros(height, width, dtype=torch.bool, device=device)
    for mask in masks:
        share = torch.as_tensor(mask, device=device)[None, None].float()
        share = torch.nn.functional.interpolate(share, (height, width), mode="bilinear", antialias=True)[0]
        lines |= boundaries(share >= 0.5)
    return Image.fromarray(lines.cpu().numpy()).convert("RGB")


def drawn_size(width: int, height: int, image_processor: HydraImageProcessor) -> tuple[int, int]:
    """Width and height of the whole image at the scale at which its middle part is trained on."""
    trained_height, trained_width = image_processor.generated_size(height, width)
    scale = max(trained_height / height, trained_width / width)
    return round(width * scale), round(height * scale)


class SegmentPainter:
    """Boundaries of all masks that SAM finds, white on black, drawn in the size in which training uses the image: lines are
    one pixel wide and whole there.

    Args:
        image_processor: its `generated_size` is the size in which training uses an image.
    """

    name = "segment"

    def __init__(
        self,
        model: str,
        device: torch.device | str,
        image_processor: HydraImageProcessor,
        points_per_side: int = MASK_SETTINGS["points_per_crop"],
    ):
        from transformers import AutoConfig, pipeline
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES as MASK_MODELS

        with loading(model):
            kind = AutoConfig.from_pretrained(model).model_type
        if kind not in MASK_MODELS:  # the pipeline would only log that
            raise ValueError(f"The segment model {model} is of type {kind!r}, expected one of {sorted(MASK_MODELS)}.")
        with loading(model):
            self.generator = pipeline("mask-generation", model=model, device=device, dtype=torch.float32)
        self.image_processor, self.mask_settings = (
            image_processor,
            MASK_SETTINGS | {"points_per_crop": points_per_side},
        )
        size = {name: side for name, side in dict(image_processor.size).items() if side}
        self.settings = {"model": model, **self.mask_settings, **size, "patch_size": image_processor.patch_size}

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        return drawn_size(width, height, self.image_processor)

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = self.target_size(*image.size)
        if max(image.size) > MAX_SEGMENTED_SIDE:
            scale = MAX_SEGMENTED_SIDE / max(image.size)
            sides = [max(1, round(side * scale)) for side in image.size]
            image = image.resize(sides, Image.Resampling.BOX)  # the mean of an area, as OpenCV's INTER_AREA
        masks = self.generator(image, **self.mask_settings)["masks"]
        return draw_boundaries(masks, height, width, self.generator.device)


def image_policy(size: str, patch_size: int) -> HydraImageProcessor:
    """How training resizes images: `448` means as many pixels as a square of this side, `448x336` this height and width.

    Raises ValueError for a size of another form, or of less than one patch.
    """
    sides = [int(side) if side.isdecimal() else 0 for side in size.split("x")]
    if len(sides) > 2 or patch_size < 1 or min(sides) < patch_size:
        raise ValueError(f"{size=} must be like 448 or 448x448 (height x width), each at least {patch_size=}.")
    if len(sides) == 2:
        return HydraImageProcessor(size={"height": sides[0], "width": sides[1]}, patch_size=patch_size)
    pixels = {"min_pixels": patch_size**2, "max_pixels": sides[0] ** 2}
    return HydraImageProcessor(size=pixels, patch_size=patch_size)
