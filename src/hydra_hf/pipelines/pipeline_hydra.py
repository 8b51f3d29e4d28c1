"""Text to image and video, and editing, with HYDRA in the form of diffusers. HYDRA, section 2.2; HYDRA-X, section 3.

negative prompt -> prefill, once -> branch -.
prompt          -> prefill, once -> branch -+
                          noise -> latents -+-> denoise_step -> scheduler -> latents, step by step
                                                                  final latents -> decode -> image
"""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor
from transformers.image_utils import ImageInput

from ..modeling.flow import inference_sigmas
from ..modeling.grid import Grid, latents_shape, num_tokens
from ..modeling.image_generation import GuidanceBranch, ImagePrefix, classifier_free, image_and_text
from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..modeling.processing_hydra import HydraProcessor
from .arguments import (
    check_choice,
    check_finite,
    check_generator,
    check_integer,
    check_interval,
    check_number,
    check_processor,
    check_tensor,
    check_texts,
)
from .diffusion_pipeline import ClipPipelineOutput, HydraDiffusionPipeline, HydraPipelineOutput, check_scheduler
from .editing import Sources, encode_sources
from .scheduling_flow_match_sde import FlowMatchSDEScheduler


MAX_STEPS, MAX_IMAGES, MAX_GUIDANCE = 10_000, 10_000, 1000.0  # more must be a mistake


class HydraPipeline(HydraDiffusionPipeline):
    """
    Generates images and clips from prompts, and edits images.

    Args:
        scheduler: Euler steps without a shift of its own: it gets noise levels that are shifted as in training. With a
            `FlowMatchSDEScheduler` steps are random, and their latents and log-probabilities are in the output.
        default_num_inference_steps, default_guidance_scale, default_image_guidance_scale: used in calls without them; saved
            with the pipeline.
    """

    model_cpu_offload_seq = "model"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        model: HydraForConditionalGeneration,
        processor: HydraProcessor,
        scheduler: FlowMatchEulerDiscreteScheduler,
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 4.5,
        default_image_guidance_scale: float = 1.5,
    ):
        super().__init__()
        check_processor(model, processor)
        check_integer("default_num_inference_steps", default_num_inference_steps, MAX_STEPS)
        check_number("default_guidance_scale", default_guidance_scale, high=MAX_GUIDANCE)
        check_number("default_image_guidance_scale", default_image_guidance_scale, high=MAX_GUIDANCE)
        self.register_modules(model=model, processor=processor, scheduler=scheduler)
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            default_image_guidance_scale=default_image_guidance_scale,
        )
        self.image_processor = VideoProcessor(vae_scale_factor=model.config.vision_config.patch_size)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> float:
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1  # as in diffusers

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback sets `_interrupt` to stop after its step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        image: ImageInput | list[list[ImageInput]] | None = None,
        image_guidance_scale: float | None = None,
        num_frames: int | None = None,
    ) -> HydraPipelineOutput | ClipPipelineOutput | tuple:
        """
        Images, or clips, for the prompts: `num_images_per_prompt` for the first, then for the second, and so on.

        Args:
            prompt: may be an empty string; with `image`, the instruction of an edit.
            negative_prompt: what guidance leads away from; None is the empty prompt, a string applies to every prompt.
            height, width: in pixels; None is the size at which the tokenizer was trained, or that of an edited image's aspect.
            num_inference_steps, guidance_scale: None is the pipeline's default; a scale of 1 or less turns guidance off.
            guidance_interval: (low, high): guidance only while low < sigma <= high; sigma is 1 for noise, 0 for data.
            guidance_rescale: from 0, plain guidance, to 1, as much contrast as without guidance (Lin et al. 2023, 3.4).
            generator: one for all, or one for each image; it draws the latents, the noise of an SDE's steps, the decoder's noise.
            latents: noise to start from, (B, C, [T',] h, w), torch or numpy, instead of the generator's.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called with pipeline, step, timestep and the requested tensors; returns a dict of those that
                change, or None.
            max_sequence_length: longest prompt in tokens, the chat around it included; None is what fits the context.
            pad_to_multiple_of: pads prompts so that those of similar lengths share a compiled step, see
                `model.compile_denoise_step`.
            image: what to edit: one image for all prompts, or one for each; or lists of several images for a prompt, the last
                of which is edited.
            image_guidance_scale: how far guidance leads to the image of an edit, before the instruction (Brooks et al. 2023);
                1 or less saves this branch; None is the pipeline's default.
            num_frames: of clips, 1 + 4n; None for images.

        Raises ValueError as `check_inputs`, and if latents or images are not finite.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if image_guidance_scale is None:
            image_guidance_scale = self.config.default_image_guidance_scale
        self.check_inputs(
            prompt, negative_prompt, height, width, num_inference_steps, guidance_scale, guidance_interval,
            guidance_rescale, num_images_per_prompt, generator, latents, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs, max_sequence_length, pad_to_multiple_of, image, image_guidance_scale, num_frames,
        )  # fmt: skip
        self._interrupt = False
        self.set_guidance(guidance_scale, image_guidance_scale)

        prompts = check_texts("prompt", prompt)
        num_images_per_prompt = int(num_images_per_prompt)
        batch_size = len(prompts) * num_images_per_prompt
        sources = None if image is None else encode_sources(self.processor, image, len(prompts), height, width)
        grid = self.get_grid(*((height, width) if sources is None else sources.size), num_frames)
        prefixes = [
            self.prepare_prefix(texts, grid, num_images_per_prompt, max_sequence_length, pad_to_multiple_of, given)
            for texts, given in self.get_conditions(
                prompts, self._negative_prompts(negative_prompt, len(prompts)), sources
            )
        ]
        latents = self.prepare_latents(batch_size, grid, generator, latents)
        sigmas = self.prepare_sigmas(int(num_inference_steps), grid)
        with self.progress_bar(total=len(sigmas)) as progress_bar:
            for step, (timestep, sigma) in enumerate(zip(self.scheduler.timesteps, sigmas)):
                if self.interrupt:
                    break
                branches = self.get_branches(prefixes, guidance_interval[0] < sigma <= guidance_interval[1])
                latents = self.denoise_step(latents, sigma, timestep, branches, guidance_rescale, generator)
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs or (), latents)
                    latents = _changed_latents(latents, callback_on_step_end(self, step, timestep, tensors))
                progress_bar.update()
        images = self.decode(latents, output_type, generator)
        self.maybe_free_model_hooks()
        trajectory = self.scheduler.trajectory if isinstance(self.scheduler, FlowMatchSDEScheduler) else ()
        output = (HydraPipelineOutput if num_frames is None else ClipPipelineOutput)(images, *trajectory)
        return output if return_dict else output.to_tuple()

    # The stages of a call, which an engine may also call one by one

    def set_guidance(self, guidance_scale: float, image_guidance_scale: float) -> None:
        """The scales that `get_conditions` and `get_branches` read."""
        self._guidance_scale, self._image_guidance_scale = float(guidance_scale), float(image_guidance_scale)

    def check_inputs(
        self, prompt, negative_prompt=None, height=None, width=None, num_inference_steps=1, guidance_scale=1.0,
        guidance_interval=(0.0, 1.0), guidance_rescale=0.0, num_images_per_prompt=1, generator=None, latents=None,
        output_type="pil", return_dict=True, callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",),
        max_sequence_length=None, pad_to_multiple_of=None, image=None, image_guidance_scale=1.0, num_frames=None,
    ) -> None:  # fmt: skip
        """Raises ValueError, with what came and what was expected, for wrong arguments of `__call__`."""
        num_prompts = len(check_texts("prompt", prompt))
        if negative_prompt is not None:
            num_negative = len(check_texts("negative_prompt", negative_prompt))
            if not isinstance(negative_prompt, str) and num_negative != num_prompts:
                raise ValueError(
                    f"Got {num_negative} negative prompts for {num_prompts} prompts, expected as many in negative_prompt."
                )
        batch_size = num_prompts * check_integer("num_images_per_prompt", num_images_per_prompt, MAX_IMAGES)
        check_integer("num_inference_steps", num_inference_steps, MAX_STEPS)
        if max_sequence_length is not None:
            check_integer("max_sequence_length", max_sequence_length)
        if pad_to_multiple_of is not None:
            context = self.model.config.text_config.max_position_embeddings
            check_integer("pad_to_multiple_of", pad_to_multiple_of, context)
        check_number("guidance_scale", guidance_scale, high=MAX_GUIDANCE)
        check_number("image_guidance_scale", image_guidance_scale, high=MAX_GUIDANCE)
        check_number("guidance_rescale", guidance_rescale, high=1)
        check_interval("guidance_interval", guidance_interval)
        check_generator(generator, batch_size)
        size = (height, width)
        if image is not None:
            if num_frames is not None:
                raise ValueError(f"Got image and {num_frames=}, expected one of them: clips cannot be edited.")
            size = encode_sources(self.processor, image, num_prompts, height, width).size
        shape = self._latents_shape(batch_size, self.get_grid(*size, num_frames))
        if latents is not None:
            check_tensor("latents", latents, shape)
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        check_choice("return_dict", return_dict, (True, False))
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_scheduler(self.scheduler)

    def get_grid(self, height: int | None, width: int | None, num_frames: int | None = None) -> Grid:
        """The grid of the latents of an image or a clip. Raises ValueError for a size off the patch grid or larger than the context,
        and for clips that the model does not have."""
        config = self.model.config
        patch_size = config.vision_config.patch_size
        for name, value in {"height": height, "width": width}.items():
            is_integer = isinstance(value, Integral) and not isinstance(value, bool)
            if value is not None and (not is_integer or value < 1 or value % patch_size):
                raise ValueError(
                    f"Got {name}={value!r:.100}, expected a positive multiple of the patch size {patch_size}."
                )
        if num_frames is not None:
            num_frames = check_integer("num_frames", num_frames)
        grid = self.model.get_latent_grid(
            *(None if size is None else int(size) for size in (height, width)), num_frames
        )
        context = config.text_config.max_position_embeddings
        room = context - config.num_time_tokens - len(config.null_prompt_ids)
        if num_tokens(grid) > room:
            side = math.isqrt(max(room, 0) // grid[0]) * patch_size
            kind = "an image" if num_frames is None else f"a clip of {num_frames} frames"
            raise ValueError(
                f"Got {height=} and {width=}, {kind} of {num_tokens(grid)} tokens, expected at most {room}: the context"
                f" has {context}. The largest square that fits is {side}x{side} pixels."
            )
        return grid

    def get_conditions(
        self, prompts: list[str], negative_prompts: list[str], sources: Sources | None = None
    ) -> list[tuple[list[str], Sources | None]]:
        """Texts and images of each branch of guidance, the full condition last: nothing, the sources alone, everything."""
        conditions = [(prompts, sources)]
        if self.do_classifier_free_guidance:
            conditions.insert(0, (negative_prompts, sources))
            if sources is not None and self.image_guidance_scale > 1:
                conditions.insert(0, (negative_prompts, None))
        return conditions

    @torch.no_grad()
    def prepare_prefix(
        self,
        texts: list[str],
        grid: Grid,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        sources: Sources | None = None,
    ) -> ImagePrefix:
        """The prefilled prompts, or negative prompts, after the images that they edit, each row repeated for its images.

        Raises ValueError for a text that is too long.
        """
        inputs = self.encode_prompts(texts, grid, max_sequence_length, pad_to_multiple_of, sources)
        return self.model.prefill(**inputs).repeat_interleave(num_images_per_prompt)

    def encode_prompts(
        self,
        texts: list[str],
        grid: Grid,
        max_sequence_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        sources: Sources | None = None,
    ) -> dict[str, Any]:
        """The arguments of the model's `prefill` for prompts, see `prepare_prefix`."""
        config = self.model.config
        num_image_tokens = config.num_time_tokens + num_tokens(grid)
        longest = config.text_config.max_position_embeddings - num_image_tokens
        longest = longest if max_sequence_length is None else min(longest, max_sequence_length)
        chats = [
            self._build_chat(text, index, len(texts), sources)
            for index, text in enumerate(check_texts("texts", texts))
        ]
        inputs = self.processor.tokenizer(
            chats, padding=True, padding_side="left", pad_to_multiple_of=pad_to_multiple_of, return_tensors="pt"
        )
        for text, length in zip(texts, inputs["attention_mask"].sum(-1).tolist()):
            if length > longest:
                raise ValueError(
                    f"Got a prompt of {length} tokens (with its chat), expected at most {longest}: the context has"
                    f" {config.text_config.max_position_embeddings}, the image needs {num_image_tokens} of them and"
                    f" {max_sequence_length=}. The prompt starts with {text[:60]!r}."
                )
        device, images = self._execution_device, {}
        if sources is not None:
            pixel_values = sources.pixel_values.to(device, self.model.dtype)
            images = {"pixel_values": pixel_values, "image_grid_thw": sources.grid_thw, "source_interaction": True}
        return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")} | images

    def _build_chat(self, text: str, index: int, num_prompts: int, sources: Sources | None) -> str:
        """The chat up to where the image begins, with all placeholders of given images."""
        if sources is None:
            return self.processor.build_image_prompt(text)
        grids = sources.grids_of(index, num_prompts)
        return self.processor.expand_images(self.processor.build_image_prompt(text, len(grids)), grids)

    def prepare_latents(
        self,
        batch_size: int,
        grid: Grid,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Initial noise (B, C, [T',] h, w), in fp32 whatever the dtype of the weights."""
        device, shape = self._execution_device, self._latents_shape(batch_size, grid)
        if latents is not None:
            return check_tensor("latents", latents, shape).to(device, torch.float32)
        generator = check_generator(generator, batch_size)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def prepare_sigmas(self, num_inference_steps: int, grid: Grid) -> list[float]:
        """Noise levels of the steps, from 1 down, which the scheduler is set to."""
        check_scheduler(self.scheduler)
        sigmas = inference_sigmas(num_inference_steps, self.model.get_sigma_shift(num_tokens(grid))).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(sigmas)
        return sigmas

    def get_branches(self, prefixes: list[ImagePrefix], is_guided: bool) -> list[GuidanceBranch]:
        """The branches of a step for the prefixes of `get_conditions`: with guidance all of them, otherwise the last."""
        if not is_guided or not self.do_classifier_free_guidance:
            return [GuidanceBranch(prefixes[-1])]
        if len(prefixes) == 1:
            raise ValueError("A callback turned guidance on, which needs a call that starts with a scale above 1.")
        if len(prefixes) == 3:
            null, source, full = prefixes
            return image_and_text(full, source, null, self.image_guidance_scale, self.guidance_scale)
        return classifier_free(prefixes[-1], prefixes[0], self.guidance_scale)

    @torch.no_grad()
    def denoise_step(
        self,
        latents: Tensor,
        sigma: float,
        timestep: Tensor,
        branches: list[GuidanceBranch],
        guidance_rescale: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) at the scheduler's next noise level, from those at `sigma`, whose number is `timestep`; `generator` is
        for schedulers with random steps."""
        sigmas = latents.new_full((len(latents),), sigma)
        velocity = self.model.denoise_step(latents, sigmas, branches, guidance_rescale)
        return self.scheduler.step(velocity.float(), timestep, latents, generator=generator, return_dict=False)[0]

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        output_type: str = "pil",
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> list[Image.Image] | list[list[Image.Image]] | np.ndarray | Tensor:
        """Images of clean latents (B, C, h, w), or clips of (B, C, T', h, w). Raises ValueError for latents or images that are not
        finite."""
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        if not isinstance(latents, Tensor) or latents.ndim not in (4, 5) or not latents.is_floating_point():
            raise ValueError(f"Got latents={latents!r:.100}, expected floats (B, C, [T,] h, w) as a torch tensor.")
        check_finite("latents", latents)
        if output_type == "latent":
            return latents
        images = self.model.decode_latents(latents, generator=check_generator(generator, len(latents)))
        images = check_finite("images", images.float())
        if images.ndim == 5:
            return self.image_processor.postprocess_video(images, output_type=output_type)
        return self.image_processor.postprocess(images, output_type=output_type)

    def _check_callback(self, callback, tensor_inputs) -> None:
        if callback is not None and not callable(callback):
            raise ValueError(f"Got callback_on_step_end={callback!r:.100}, expected a function or a PipelineCallback.")
        if not isinstance(tensor_inputs, list | tuple | None):
            raise ValueError(
                f"Got callback_on_step_end_tensor_inputs={tensor_inputs!r:.100}, expected a list of names or None."
            )
        for name in tensor_inputs or ():
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"Got {name!r} in callback_on_step_end_tensor_inputs, expected some of {self._callback_tensor_inputs}."
                )

    def _negative_prompts(self, negative_prompt: str | list[str] | None, num_prompts: int) -> list[str]:
        if isinstance(negative_prompt, list | tuple):
            return list(negative_prompt)
        return [negative_prompt or ""] * num_prompts

    def _latents_shape(self, batch_size: int, grid: Grid) -> tuple[int, ...]:
        return (batch_size, *latents_shape(self.model.config.vision_config.latent_channels, grid))


def _changed_latents(latents: Tensor, changes) -> Tensor:
    """The latents after a callback. Raises ValueError if it returned neither a dict nor None."""
    if changes is None:
        return latents
    if not isinstance(changes, dict):
        raise ValueError(f"callback_on_step_end returned {changes!r:.100}, expected a dict of tensors or None.")
    changed = changes.get("latents", latents)
    return check_tensor("latents from callback_on_step_end", changed, tuple(latents.shape)).to(latents)
