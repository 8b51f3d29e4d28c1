"""Pictures through the tokenizer and back, in the form of diffusers. HYDRA, section 3.2."""

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers.image_utils import ImageInput

from ..modeling.grid import unpack_images
from ..modeling.image_processing_hydra import HydraImageProcessor
from ..modeling.modeling_hydra_tok import HydraTokModel
from .pipeline_hydra import HydraDiffusionPipeline


class HydraReconstructionPipeline(HydraDiffusionPipeline):
    """What a tokenizer keeps of a picture: encoded (mode of the posterior) and decoded."""

    model_cpu_offload_seq = "vision_tower"

    def __init__(self, vision_tower: HydraTokModel, image_processor: HydraImageProcessor):
        super().__init__()
        self.register_modules(vision_tower=vision_tower, image_processor=image_processor)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        The reconstructions, at the size that the image processor gives; a list where images differ in size.

        Args:
            image: one or a list of what `HydraImageProcessor` reads; torch tensors in [-1, 1].
            num_inference_steps: Euler steps of a flow decoder; None is the number in its config.
            generator: one, or one for each picture; it draws the noise of a flow decoder.
            output_type: "pil", "np" or "pt".

        Raises:
            ValueError: for images that the processor refuses, another output type, steps below 1, or generators that
                are not as many as the images.
        """
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"Got {num_inference_steps=}, expected at least 1.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"Got {output_type=}, expected 'pil', 'np' or 'pt'.")
        processed = self.image_processor(image, return_tensors="pt").to(self._execution_device)
        originals = unpack_images(**processed, patch_size=self.image_processor.patch_size)
        if isinstance(generator, list | tuple) and len(generator) != len(originals):
            raise ValueError(
                f"Got {len(generator)} generators, expected one, or one for each of {len(originals)} images."
            )
        if len({original.shape for original in originals}) == 1:
            images = self._reconstruct(torch.stack(originals), num_inference_steps, generator)
        else:
            generators = generator if isinstance(generator, list | tuple) else [generator] * len(originals)
            images = [
                self._reconstruct(original[None], num_inference_steps, one)[0]
                for original, one in zip(originals, generators)
            ]
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _reconstruct(self, pixel_values: Tensor, num_inference_steps: int | None, generator) -> Tensor:
        latents = self.vision_tower.encode(pixel_values).latent_dist.mode()
        return self.vision_tower.decode(latents, num_inference_steps=num_inference_steps, generator=generator).sample
