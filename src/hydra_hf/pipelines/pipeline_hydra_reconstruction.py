"""Pictures through the tokenizer and back, in the form of diffusers. HYDRA, section 3.2."""

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from transformers.image_utils import ImageInput

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
        The reconstructions, at the size that the image processor gives.

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
        pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"]
        if isinstance(generator, list | tuple) and len(generator) != len(pixel_values):
            raise ValueError(
                f"Got {len(generator)} generators, expected one, or one for each of {len(pixel_values)} images."
            )
        latents = self.vision_tower.encode(pixel_values.to(self._execution_device)).latent_dist.mode()
        images = self.vision_tower.decode(latents, num_inference_steps=num_inference_steps, generator=generator).sample
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
