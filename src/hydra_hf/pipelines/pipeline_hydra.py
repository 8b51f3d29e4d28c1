"""Text to image with HYDRA, in the form of diffusers. HYDRA, section 2.2.

negative prompt -> prefill, once -> branch -.
prompt          -> prefill, once -> branch -+
                          noise -> latents -+-> denoise_step -> scheduler -> latents, step by step
                                                                  final latents -> decode -> image
"""

import math
import os
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ..hub import HUB_OPTIONS, check_model_name
from ..modeling.flow import inference_sigmas
from ..modeling.grid import Grid, num_tokens
from ..modeling.image_generation import GuidanceBranch, ImagePrefix, classifier_free
from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..modeling.processing_hydra import HydraProcessor
from .arguments import (
    check_choice,
    check_finite,
    check_generator,
    check_integer,
    check_number,
    check_path,
    check_processor,
    check_tensor,
    check_texts,
)


MAX_STEPS, MAX_IMAGES, MAX_GUIDANCE = 10_000, 10_000, 1000.0  # more must be a mistake
SCHEDULER_OPTIONS = {
    "shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip  # options that leave the noise levels to the pipeline


class HydraDiffusionPipeline(DiffusionPipeline):
    """What the pipelines share: loading and saving classes that diffusers does not ship."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As in diffusers. Raises ValueError if the name is neither a folder nor a repo id, or the folder is incomplete."""
        path = check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        components, _ = cls._get_signature_keys(cls)
        if os.path.isdir(path):
            expected = ["model_index.json", *sorted(set(components) - set(kwargs))]
            if missing := [name for name in expected if not (Path(path) / name).exists()]:
                raise ValueError(f"{path!r} is not a {cls.__name__}: it has no {missing}, expected {expected}.")
        else:
            check_model_name(path)
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """The folder of a repo's snapshot; diffusers' own method refuses components of other libraries."""
        options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        components, _ = cls._get_signature_keys(cls)
        patterns = ["model_index.json", *(f"{name}/*" for name in components)]
        return snapshot_download(pretrained_model_name, allow_patterns=patterns, **options)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in diffusers. Raises ValueError if the model has adapters, which diffusers would leave out silently."""
        check_path("save_directory", save_directory)
        for name, component in self.components.items():
            if is_compiled_module(component):
                component = component._orig_mod
            if not isinstance(component, torch.nn.Module):
                continue
            if not isinstance(component, PreTrainedModel) or component._hf_peft_config_loaded:
                raise ValueError(
                    f"{name} is a {type(component).__name__} that holds adapters or is wrapped; its weights would not be"
                    f" saved. Expected a transformers model: merge first, as in model.merge_and_unload() of peft."
                )
        super().save_pretrained(save_directory, **kwargs)


class HydraPipeline(HydraDiffusionPipeline):
    """
    Generates images from prompts.

    Args:
        scheduler: Euler steps without a shift of its own: it gets noise levels that are shifted as in training.
        default_num_inference_steps, default_guidance_scale: used in calls without them; saved with the pipeline.
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
    ):
        super().__init__()
        check_processor(model, processor)
        check_integer("default_num_inference_steps", default_num_inference_steps, MAX_STEPS)
        check_number("default_guidance_scale", default_guidance_scale, high=MAX_GUIDANCE)
        self.register_modules(model=model, processor=processor, scheduler=scheduler)
        self.register_to_config(
            default_num_inference_steps=default_num_inference_steps, default_guidance_scale=default_guidance_scale
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=model.config.vision_config.patch_size)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

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
    ) -> ImagePipelineOutput | tuple:
        """
        Images for the prompts: `num_images_per_prompt` for the first, then for the second, and so on.

        Args:
            prompt: may be an empty string.
            negative_prompt: what guidance leads away from; None is the empty prompt, a string applies to every prompt.
            height, width: in pixels; None is the size at which the tokenizer was trained.
            num_inference_steps, guidance_scale: None is the pipeline's default; a scale of 1 or less turns guidance off.
            guidance_interval: (low, high): guidance only while low < sigma <= high; sigma is 1 for noise, 0 for data.
            guidance_rescale: from 0, plain guidance, to 1, as much contrast as without guidance (Lin et al. 2023, 3.4).
            generator: one for all, or one for each image; it draws the latents, then the decoder's noise.
            latents: noise to start from, (B, C, h, w), torch or numpy, instead of the generator's.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called with pipeline, step, timestep and the requested tensors; returns a dict of those that
                change, or None.
            max_sequence_length: longest prompt in tokens, the chat around it included; None is what fits the context.
            pad_to_multiple_of: pads prompts so that those of similar lengths share a compiled step, see
                `model.compile_denoise_step`.

        Raises ValueError as `check_inputs`, and if latents or images are not finite.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        self.check_inputs(
            prompt, negative_prompt, height, width, num_inference_steps, guidance_scale, guidance_interval,
            guidance_rescale, num_images_per_prompt, generator, latents, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs, max_sequence_length, pad_to_multiple_of,
        )  # fmt: skip
        self._guidance_scale, self._interrupt = float(guidance_scale), False

        prompts = check_texts("prompt", prompt)
        num_images_per_prompt = int(num_images_per_prompt)
        batch_size = len(prompts) * num_images_per_prompt
        grid = self.get_grid(height, width)
        texts = [self._negative_prompts(negative_prompt, len(prompts))] if self.do_classifier_free_guidance else []
        prefixes = [
            self.prepare_prefix(branch, grid, num_images_per_prompt, max_sequence_length, pad_to_multiple_of)
            for branch in [*texts, prompts]
        ]
        latents = self.prepare_latents(batch_size, grid, generator, latents)
        sigmas = self.prepare_sigmas(int(num_inference_steps), grid)
        with self.progress_bar(total=len(sigmas)) as progress_bar:
            for step, (timestep, sigma) in enumerate(zip(self.scheduler.timesteps, sigmas)):
                if self.interrupt:
                    break
                branches = self.get_branches(prefixes, guidance_interval[0] < sigma <= guidance_interval[1])
                latents = self.denoise_step(latents, sigma, timestep, branches, guidance_rescale)
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs or (), latents)
                    latents = _changed_latents(latents, callback_on_step_end(self, step, timestep, tensors))
                progress_bar.update()
        images = self.decode(latents, output_type, generator)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # The stages of a call, which an engine may also call one by one

    def check_inputs(
        self, prompt, negative_prompt=None, height=None, width=None, num_inference_steps=1, guidance_scale=1.0,
        guidance_interval=(0.0, 1.0), guidance_rescale=0.0, num_images_per_prompt=1, generator=None, latents=None,
        output_type="pil", return_dict=True, callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",),
        max_sequence_length=None, pad_to_multiple_of=None,
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
        check_number("guidance_rescale", guidance_rescale, high=1)
        _check_interval(guidance_interval)
        check_generator(generator, batch_size)
        shape = self._latents_shape(batch_size, self.get_grid(height, width))
        if latents is not None:
            check_tensor("latents", latents, shape)
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        check_choice("return_dict", return_dict, (True, False))
        self._check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        _check_scheduler(self.scheduler)

    def get_grid(self, height: int | None, width: int | None) -> Grid:
        """The grid of an image's latents. Raises ValueError for a size off the patch grid or larger than the context."""
        config = self.model.config
        patch_size = config.vision_config.patch_size
        for name, value in {"height": height, "width": width}.items():
            is_integer = isinstance(value, Integral) and not isinstance(value, bool)
            if value is not None and (not is_integer or value < 1 or value % patch_size):
                raise ValueError(
                    f"Got {name}={value!r:.100}, expected a positive multiple of the patch size {patch_size}."
                )
        grid = self.model.get_latent_grid(*(None if size is None else int(size) for size in (height, width)))
        context = config.text_config.max_position_embeddings
        room = context - config.num_time_tokens - len(config.null_prompt_ids)
        if num_tokens(grid) > room:
            side = math.isqrt(max(room, 0)) * patch_size
            raise ValueError(
                f"Got {height=} and {width=}, an image of {num_tokens(grid)} tokens, expected at most {room}: the context"
                f" has {context}. The largest square that fits is {side}x{side} pixels."
            )
        return grid

    @torch.no_grad()
    def prepare_prefix(
        self,
        texts: list[str],
        grid: Grid,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> ImagePrefix:
        """The prefilled prompts, or negative prompts, each row repeated for its images.

        Raises ValueError for a text that is too long.
        """
        config = self.model.config
        num_image_tokens = config.num_time_tokens + num_tokens(grid)
        longest = config.text_config.max_position_embeddings - num_image_tokens
        longest = longest if max_sequence_length is None else min(longest, max_sequence_length)
        chats = [self.processor.build_image_prompt(text) for text in check_texts("texts", texts)]
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
        device = self._execution_device
        prefix = self.model.prefill(inputs["input_ids"].to(device), inputs["attention_mask"].to(device))
        if num_images_per_prompt == 1:
            return prefix
        prefix.cache.batch_repeat_interleave(num_images_per_prompt)
        return ImagePrefix(prefix.cache, prefix.attention_mask.repeat_interleave(num_images_per_prompt, dim=0))

    def prepare_latents(
        self,
        batch_size: int,
        grid: Grid,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Initial noise (B, C, h, w), in fp32 whatever the dtype of the weights."""
        device, shape = self._execution_device, self._latents_shape(batch_size, grid)
        if latents is not None:
            return check_tensor("latents", latents, shape).to(device, torch.float32)
        generator = check_generator(generator, batch_size)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def prepare_sigmas(self, num_inference_steps: int, grid: Grid) -> list[float]:
        """Noise levels of the steps, from 1 down, which the scheduler is set to."""
        _check_scheduler(self.scheduler)
        sigmas = inference_sigmas(num_inference_steps, self.model.get_sigma_shift(num_tokens(grid))).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(sigmas)
        return sigmas

    def get_branches(self, prefixes: list[ImagePrefix], is_guided: bool) -> list[GuidanceBranch]:
        """The branches of a step: the prompt, which is last in `prefixes`; with guidance, the negative prompt before it."""
        if not is_guided or not self.do_classifier_free_guidance:
            return [GuidanceBranch(prefixes[-1])]
        if len(prefixes) == 1:
            raise ValueError("A callback turned guidance on, which needs a call that starts with a scale above 1.")
        return classifier_free(prefixes[-1], prefixes[0], self.guidance_scale)

    @torch.no_grad()
    def denoise_step(
        self,
        latents: Tensor,
        sigma: float,
        timestep: Tensor,
        branches: list[GuidanceBranch],
        guidance_rescale: float = 0.0,
    ) -> Tensor:
        """Latents (B, C, h, w) at the scheduler's next noise level, from those at `sigma`, whose number is `timestep`."""
        sigmas = latents.new_full((len(latents),), sigma)
        velocity = self.model.denoise_step(latents, sigmas, branches, guidance_rescale)
        return self.scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        output_type: str = "pil",
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> list[Image.Image] | np.ndarray | Tensor:
        """Images of clean latents (B, C, h, w). Raises ValueError for latents or images that are not finite."""
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        if not isinstance(latents, Tensor) or latents.ndim != 4 or not latents.is_floating_point():
            raise ValueError(f"Got latents={latents!r:.100}, expected floats (B, C, h, w) as a torch tensor.")
        check_finite("latents", latents)
        if output_type == "latent":
            return latents
        images = self.model.decode_latents(latents, generator=check_generator(generator, len(latents)))
        return self.image_processor.postprocess(check_finite("images", images.float()), output_type=output_type)

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
        return (batch_size, self.model.config.vision_config.latent_channels, *grid[1:])


def _check_interval(interval) -> None:
    is_pair = isinstance(interval, list | tuple) and len(interval) == 2
    if not is_pair or not all(isinstance(end, Real) for end in interval) or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"Got guidance_interval={interval!r:.100}, expected (low, high) with 0 <= low <= high <= 1.")


def _check_scheduler(scheduler) -> None:
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"Got a {type(scheduler).__name__} as scheduler, expected a FlowMatchEulerDiscreteScheduler: the noise levels"
            " are the pipeline's own."
        )
    options = {**scheduler.config, "shift": scheduler.shift}
    if changed := {name: options[name] for name, value in SCHEDULER_OPTIONS.items() if options[name] != value}:
        raise ValueError(
            f"Got a scheduler with {_joined(changed)}, expected {_joined({name: SCHEDULER_OPTIONS[name] for name in changed})}:"
            " the noise levels are the pipeline's own."
        )


def _joined(options: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _changed_latents(latents: Tensor, changes) -> Tensor:
    """The latents after a callback. Raises ValueError if it returned neither a dict nor None."""
    if changes is None:
        return latents
    if not isinstance(changes, dict):
        raise ValueError(f"callback_on_step_end returned {changes!r:.100}, expected a dict of tensors or None.")
    changed = changes.get("latents", latents)
    return check_tensor("latents from callback_on_step_end", changed, tuple(latents.shape)).to(latents)
