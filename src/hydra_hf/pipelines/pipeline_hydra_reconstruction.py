"""Images encoded by the tokenizer and decoded again, in the form of diffusers. HYDRA, section 3.2."""

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers.image_utils import ImageInput

from ..modeling.grid import unpack_images
from ..modeling.image_processing_hydra import HydraImageProcessor
from ..modeling.modeling_hydra_tok import HydraTokModel
from .arguments import check_choice, check_finite, check_generator, check_integer
from .diffusion_pipeline import HydraDiffusionPipeline
from .pipeline_hydra import MAX_STEPS


class HydraReconstructionPipeline(HydraDiffusionPipeline):
    """What a tokenizer keeps of an image: it is encoded (mode of the posterior) and decoded."""

    model_cpu_offload_seq = "vision_tower"

    def __init__(self, vision_tower: HydraTokModel, image_processor: HydraImageProcessor):
        super().__init__()
        if not isinstance(vision_tower, HydraTokModel):
            raise ValueError(f"Got a {type(vision_tower).__name__} as vision_tower, expected a HydraTokModel.")
        if not isinstance(image_processor, HydraImageProcessor):
            raise ValueError(
                f"Got a {type(image_processor).__name__} as image_processor, expected a HydraImageProcessor."
            )
        if image_processor.patch_size != vision_tower.config.patch_size:
            raise ValueError(
                f"The image_processor does not belong to the model: its patch_size is {image_processor.patch_size}, expected"
                f" {vision_tower.config.patch_size} as in the model's config."
            )
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
        The reconstructions, at the size that the image processor gives; a list if the images differ in size.

        Args:
            image: one image or a list, of any kind that `HydraImageProcessor` reads; torch tensors in [-1, 1].
            num_inference_steps: Euler steps of a flow decoder; None is the number in its config.
            generator: one for all, or one for each image; it draws the noise of a flow decoder.
            output_type: "pil", "np" or "pt".

        Raises:
            ValueError: for wrong arguments, or if the images are not finite.
        """
        if num_inference_steps is not None:
            num_inference_steps = check_integer("num_inference_steps", num_inference_steps, MAX_STEPS)
        check_choice("output_type", output_type, ("pil", "np", "pt"))
        check_choice("return_dict", return_dict, (True, False))
        processed = self.image_processor(image, return_tensors="pt").to(self._execution_device)
        originals = unpack_images(**processed, patch_size=self.image_processor.patch_size)
        generator = check_generator(generator, len(originals))
        if len({original.shape for original in originals}) == 1:
            images = self._reconstruct(torch.stack(originals), num_inference_steps, generator)
        else:
            generators = generator if isinstance(generator, list) else [generator] * len(originals)
            images = [
                self._reconstruct(original[None], num_inference_steps, one)[0]
                for original, one in zip(originals, generators)
            ]
        for reconstruction in images:
            check_finite("images", reconstruction)
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _reconstruct(self, pixel_values: Tensor, num_inference_steps: int | None, generator) -> Tensor:
        latents = self.vision_tower.encode(pixel_values).latent_dist.mode()
        return self.vision_tower.decode(latents, num_inference_steps=num_inference_steps, generator=generator).sample
