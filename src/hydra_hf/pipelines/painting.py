"""Images painted from images: a prompt and an image in, an image out. UniMRG, section 3.1.

The prompt comes first (our choice): the distance from a patch of the image to the same patch of what is painted is then always
the same, and the image is read with its task in mind.
"""

import torch
from PIL import Image
from torch import Tensor

from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..modeling.processing_hydra import HydraProcessor
from .answering import encode_turns
from .arguments import check_processor, check_texts


@torch.no_grad()
def paint(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    images: list[Image.Image],
    prompts: list[str],
    num_inference_steps: int = 24,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """What each prompt asks for, such as a depth map of its image: (3, H, W) in [-1, 1] each, at the size of the processed image.

    Raises ValueError if the lists differ in length or the processor does not belong to the model.
    """
    check_processor(model, processor)
    if len(images) != len(check_texts("prompts", prompts)):
        raise ValueError(f"Got {len(images)} images and {len(prompts)} prompts, expected as many of each.")
    turns = [
        [{"type": "text", "text": prompt}, {"type": "image", "image": image}] for image, prompt in zip(images, prompts)
    ]
    inputs = encode_turns(model, processor, turns)
    heights, widths = ((inputs["image_grid_thw"][:, axis] * processor.patch_size).tolist() for axis in (1, 2))
    return list(
        model.generate_images(
            **inputs,
            height=heights,
            width=widths,
            num_inference_steps=num_inference_steps,
            guidance_scale=1.0,
            generator=generator,
        )  # fmt: skip
    )
