"""Text to image with HYDRA, in the form of diffusers. HYDRA, section 2.2.

prompt          -> prefill, once -> prefix ----------.
negative prompt -> prefill, once -> negative prefix -+
                                   noise -> latents -+-> denoise_step -> scheduler -> latents, step by step
                                                                      last of the latents -> decode -> picture
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ..hub import HUB_OPTIONS, check_repo_id
from ..modeling.flow import inference_sigmas
from ..modeling.grid import Grid, num_tokens
from ..modeling.image_generation import ImagePrefix
from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..modeling.processing_hydra import HydraProcessor


class HydraDiffusionPipeline(DiffusionPipeline):
    """What our pipelines share: loading and saving classes that diffusers does not ship."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As in diffusers. Raises ValueError for what is neither a folder nor a repo id, and for an incomplete folder."""
        path = os.fspath(pretrained_model_name_or_path)
        components, _ = cls._get_signature_keys(cls)
        if os.path.isdir(path):
            expected = ["model_index.json", *sorted(set(components) - set(kwargs))]
            if missing := [name for name in expected if not (Path(path) / name).exists()]:
                raise ValueError(f"{path!r} is no {cls.__name__}: it has no {missing}, expected {expected}.")
        else:
            check_repo_id(path)
        return super().from_pretrained(path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """The folder of a repo's snapshot; diffusers' own refuses components of other libraries."""
        options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        components, _ = cls._get_signature_keys(cls)
        patterns = ["model_index.json", *(f"{name}/*" for name in components)]
        return snapshot_download(pretrained_model_name, allow_patterns=patterns, **options)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in diffusers. Raises ValueError for a model with adapters, which diffusers would leave out silently."""
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
    Draws pictures from prompts.

    Args:
        scheduler: Euler steps, without a shift of its own: the noise levels come shifted as in training.
        default_num_inference_steps, default_guidance_scale: what a call without them means; saved with the pipeline.
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
        return self._guidance_scale != 1

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
        Pictures of the prompts, `num_images_per_prompt` of the first, then of the second.

        Args:
            prompt: may be an empty string.
            negative_prompt: what guidance leads away from; None is the empty prompt, a string counts for every prompt.
            height, width: in pixels; None is the size at which the tokenizer was trained.
            num_inference_steps, guidance_scale: None is the pipeline's default; a scale of 1 is no guidance.
            guidance_interval: (low, high): guidance only while low < sigma <= high, noise being sigma 1.
            guidance_rescale: from 0, plain guidance, to 1, as much contrast as without guidance (Lin et al. 2023, 3.4).
            generator: one, or one for each picture; it draws the latents, then the decoder's noise.
            latents: noise to start from, (B, C, h, w), instead of the generator's.
            output_type: "pil", "np", "pt" or "latent".
            max_sequence_length: longest prompt in tokens, the chat around it included; None is what the context leaves.
            pad_to_multiple_of: prompts of several lengths then share a compiled step, see `model.compile_denoise_step`.

        Raises:
            ValueError: see `check_inputs`.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        self.check_inputs(
            prompt, negative_prompt, height, width, num_inference_steps, guidance_interval, guidance_rescale,
            num_images_per_prompt, generator, latents, output_type, callback_on_step_end_tensor_inputs,
            max_sequence_length, pad_to_multiple_of,
        )  # fmt: skip
        self._guidance_scale, self._interrupt = guidance_scale, False

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        batch_size = len(prompts) * num_images_per_prompt
        grid = self.model.get_latent_grid(height, width)
        prefix_options = grid, num_images_per_prompt, max_sequence_length, pad_to_multiple_of
        prefix = self.prepare_prefix(prompts, *prefix_options)
        negative_prefix = None
        if self.do_classifier_free_guidance:
            negative_prompts = self._negative_prompts(negative_prompt, len(prompts))
            negative_prefix = self.prepare_prefix(negative_prompts, *prefix_options)
        latents = self.prepare_latents(batch_size, grid, generator, latents)
        sigmas = self.prepare_sigmas(num_inference_steps, grid)
        with self.progress_bar(total=len(sigmas)) as progress_bar:
            for step, (timestep, sigma) in enumerate(zip(self.scheduler.timesteps, sigmas)):
                if self.interrupt:
                    break
                is_guided = self.do_classifier_free_guidance and guidance_interval[0] < sigma <= guidance_interval[1]
                if is_guided and negative_prefix is None:
                    raise ValueError(
                        "A callback turned guidance on, which needs a call that starts with a scale other than 1."
                    )
                velocity = self.model.denoise_step(
                    latents,
                    latents.new_full((batch_size,), sigma),
                    prefix,
                    negative_prefix if is_guided else None,
                    self.guidance_scale,
                    guidance_rescale,
                )
                latents = self.scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, step, timestep, tensors).pop("latents", latents)
                progress_bar.update()
        images = latents
        if output_type != "latent":
            images = self.model.decode_latents(latents, generator=generator)
            images = self.image_processor.postprocess(images.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(
        self, prompt, negative_prompt, height, width, num_inference_steps, guidance_interval, guidance_rescale,
        num_images_per_prompt, generator, latents, output_type, callback_on_step_end_tensor_inputs,
        max_sequence_length, pad_to_multiple_of,
    ) -> None:  # fmt: skip
        """Raises ValueError, with what came and what was expected, for arguments of `__call__` that cannot be drawn."""
        if not isinstance(prompt, str) and not (_is_list_of_strings(prompt) and prompt):
            raise ValueError(f"Got {prompt=}, expected a string or a list of at least one string.")
        num_prompts = 1 if isinstance(prompt, str) else len(prompt)
        if not (negative_prompt is None or isinstance(negative_prompt, str) or _is_list_of_strings(negative_prompt)):
            raise ValueError(f"Got {negative_prompt=}, expected a string, a list of strings or None.")
        if isinstance(negative_prompt, list | tuple) and len(negative_prompt) != num_prompts:
            raise ValueError(
                f"Got {len(negative_prompt)} negative prompts for {num_prompts} prompts, expected as many."
            )
        for name, value in {
            "num_inference_steps": num_inference_steps,
            "num_images_per_prompt": num_images_per_prompt,
            "max_sequence_length": 1 if max_sequence_length is None else max_sequence_length,
            "pad_to_multiple_of": 1 if pad_to_multiple_of is None else pad_to_multiple_of,
        }.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Got {name}={value!r}, expected an integer of at least 1.")
        patch_size = self.model.config.vision_config.patch_size
        for name, value in {"height": height, "width": width}.items():
            if value is not None and (not isinstance(value, int) or value < 1 or value % patch_size):
                raise ValueError(f"Got {name}={value!r}, expected a positive multiple of the patch size {patch_size}.")
        is_pair = isinstance(guidance_interval, list | tuple) and len(guidance_interval) == 2
        if not is_pair or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(f"Got {guidance_interval=}, expected (low, high) with 0 <= low <= high <= 1.")
        if not isinstance(guidance_rescale, int | float) or not 0 <= guidance_rescale <= 1:
            raise ValueError(f"Got {guidance_rescale=}, expected a number from 0 to 1.")
        batch_size = num_prompts * num_images_per_prompt
        if isinstance(generator, list | tuple) and len(generator) != batch_size:
            raise ValueError(
                f"Got {len(generator)} generators, expected one, or one for each of {batch_size} pictures."
            )
        shape = self._latents_shape(batch_size, self.model.get_latent_grid(height, width))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"Got latents of shape {tuple(latents.shape)}, expected {shape}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"Got {output_type=}, expected 'pil', 'np', 'pt' or 'latent'.")
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"Got {name!r} in callback_on_step_end_tensor_inputs, expected some of {self._callback_tensor_inputs}."
                )
        if self.scheduler.config.shift != 1 or self.scheduler.config.use_dynamic_shifting:
            raise ValueError(
                f"Got a scheduler with shift={self.scheduler.config.shift} and use_dynamic_shifting="
                f"{self.scheduler.config.use_dynamic_shifting}, expected 1.0 and False: the pipeline shifts by itself."
            )

    def prepare_prefix(
        self,
        texts: list[str],
        grid: Grid,
        num_images_per_prompt: int,
        max_sequence_length: int | None,
        pad_to_multiple_of: int | None,
    ) -> ImagePrefix:
        """Prompts, or negative prompts, read once, each row repeated for its pictures. ValueError for a text too long."""
        config = self.model.config
        num_image_tokens = config.num_time_tokens + num_tokens(grid)
        longest = config.text_config.max_position_embeddings - num_image_tokens
        longest = longest if max_sequence_length is None else min(longest, max_sequence_length)
        chats = [self.processor.build_image_prompt(text) for text in texts]
        inputs = self.processor.tokenizer(
            chats, padding=True, padding_side="left", pad_to_multiple_of=pad_to_multiple_of, return_tensors="pt"
        )
        for text, length in zip(texts, inputs["attention_mask"].sum(-1).tolist()):
            if length > longest:
                raise ValueError(
                    f"Got a prompt of {length} tokens (with its chat), expected at most {longest}: the context has"
                    f" {config.text_config.max_position_embeddings}, the picture needs {num_image_tokens} of them and"
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
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise (B, C, h, w) to start from, in fp32 whatever the weights are."""
        device = self._execution_device
        if latents is not None:
            return latents.to(device, torch.float32)
        shape = self._latents_shape(batch_size, grid)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def prepare_sigmas(self, num_inference_steps: int, grid: Grid) -> list[float]:
        """The noise levels of the steps, from 1 down; the scheduler is set to them."""
        sigmas = inference_sigmas(num_inference_steps, self.model.get_sigma_shift(num_tokens(grid))).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(sigmas)
        return sigmas

    def _negative_prompts(self, negative_prompt: str | list[str] | None, num_prompts: int) -> list[str]:
        if isinstance(negative_prompt, list | tuple):
            return list(negative_prompt)
        return [negative_prompt or ""] * num_prompts

    def _latents_shape(self, batch_size: int, grid: Grid) -> tuple[int, ...]:
        return (batch_size, self.model.config.vision_config.latent_channels, *grid[1:])


def _is_list_of_strings(value) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
