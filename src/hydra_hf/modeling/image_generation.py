"""Drawing with HYDRA: the prompt once, then only image tokens, step by step. HYDRA, section 2.2."""

from dataclasses import dataclass, field
from types import MethodType

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_bidirectional_mask

from .compat import CACHE
from .flow import euler_step, expand_sigma, inference_sigmas, resolution_shift
from .prefix_cache import FrozenPrefixCache


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor, rescale: Tensor) -> Tensor:
    """Classifier-free guidance of velocities (B, C, h, w), each sample by itself; `scale` and `rescale` (B,).

    `rescale` in [0, 1] draws the spread of a guided sample back to that of its condition (Lin et al. 2023, section 3.4).
    """
    scale, rescale = expand_sigma(scale, conditional), expand_sigma(rescale, conditional)
    guided = unconditional + scale * (conditional - unconditional)
    ratio = _spread(conditional) / _spread(guided).clamp(min=1e-8)  # a new head says 0 everywhere
    return guided * (1 + rescale * (ratio - 1))


def _spread(samples: Tensor) -> Tensor:
    return expand_sigma(samples.flatten(1).std(dim=1), samples)


def _per_sample(value: float | Tensor, samples: Tensor) -> Tensor:
    """(B,) of a number or of as many; never a number, for each of which a compiled step would be compiled again."""
    value = torch.as_tensor(value, dtype=torch.float32, device=samples.device)
    if value.numel() not in (1, len(samples)):
        raise ValueError(
            f"Guidance of {value.numel()} values does not fit {len(samples)} images, expected one for each."
        )
    return value.reshape(-1).expand(len(samples)).contiguous()


@dataclass
class ImagePrefix:
    """Prefilled prompts, one for each image: those to draw, or the negative ones that guidance leads away from."""

    cache: FrozenPrefixCache
    attention_mask: Tensor  # (B, P)
    masks: dict[int, Tensor] = field(default_factory=dict)  # number of image tokens N -> mask (B, 1, 1, P + N)

    def __len__(self) -> int:
        return len(self.attention_mask)


class ImageGenerationMixin:
    """What `GenerationMixin` is for text: for a model with `model`, `vision_head` and a `HydraConfig`."""

    def get_sigma_shift(self, num_tokens: int) -> float:
        """The shift of the noise levels for latents of `num_tokens`, the same in training and in sampling."""
        if self.config.sigma_shift is not None:
            return float(self.config.sigma_shift)
        return resolution_shift(num_tokens * self.config.vision_config.latent_channels)

    @apply_forward_hook
    def prefill(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None) -> ImagePrefix:
        """Reads prompts (B, P), left-padded, that end with <|vision_start|>; their cache is read-only from then on."""
        if (input_ids[:, -1] != self.config.vision_start_token_id).any():
            raise ValueError(
                f"A prompt to draw from ends with vision_start_token_id={self.config.vision_start_token_id};"
                f" the last tokens are {input_ids[:, -1].tolist()}. Pad on the left."
            )
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.config.text_config)
        self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
            pixel_values=pixel_values, use_cache=True,
        )  # fmt: skip
        return ImagePrefix(FrozenPrefixCache.from_cache(cache), attention_mask)

    @apply_forward_hook
    def denoise_step(
        self,
        latents: Tensor,
        sigma: Tensor,
        prefix: ImagePrefix,
        negative_prefix: ImagePrefix | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
    ) -> Tensor:
        """Velocity (B, C, h, w) of latents at `sigma` (B,), guided when there are negative prompts.

        Only image tokens run; Sem-ViT runs once for both branches and the language head not at all. A branch is as long as
        its own prompts: an empty negative prompt reads no padding of a long prompt.

        Args:
            guidance_scale, guidance_rescale: one for all, or (B,); see `guide`.

        Raises:
            ValueError: for a prefix or guidance that is not of as many rows as there are latents.
        """
        prefixes = [prefix] if negative_prefix is None else [prefix, negative_prefix]
        for branch in prefixes:
            if len(branch) != len(latents):
                raise ValueError(f"A prefix of {len(branch)} rows does not fit latents of {len(latents)} images.")
        num_tokens = self.config.num_time_tokens + latents[0, 0].numel()
        masks = [self._get_step_mask(branch, num_tokens) for branch in prefixes]
        scale, rescale = _per_sample(guidance_scale, latents), _per_sample(guidance_rescale, latents)
        return self._guided_velocity(latents, sigma, prefixes, masks, scale, rescale)

    def compile_denoise_step(self, **kwargs) -> None:
        """Compiles what `denoise_step` computes, for drawing many pictures; `kwargs` are those of `torch.compile`.

        A graph serves all prompts of one padded length: let the tokenizer, or the pipeline, `pad_to_multiple_of` 64.
        """
        step = torch.compile(type(self)._guided_velocity, **{"fullgraph": True, **kwargs})
        self._guided_velocity = MethodType(step, self)  # a method, so that a deep copy compiles its own weights

    def _guided_velocity(self, latents, sigma, prefixes, masks, scale, rescale) -> Tensor:
        embeds = self.model.get_image_embeds(latents, sigma)  # (B, [1 +] N, D_llm)
        velocities = []
        for prefix, mask in zip(prefixes, masks):
            states = self._image_states(embeds, prefix, mask)  # (B, N, D_llm)
            velocities.append(self._draw(states, latents, sigma))
        return velocities[0] if len(velocities) == 1 else guide(*velocities, scale, rescale)

    def _image_states(self, embeds: Tensor, prefix: ImagePrefix, mask: Tensor) -> Tensor:
        positions = torch.arange(embeds.shape[1], device=embeds.device)
        outputs = self.model.language_model(
            inputs_embeds=embeds.to(self.get_input_embeddings().weight.dtype), attention_mask=mask,
            position_ids=prefix.attention_mask.sum(-1, keepdim=True) + positions,
            use_cache=True, **{CACHE: prefix.cache},
        )  # fmt: skip
        return outputs.last_hidden_state[:, self.config.num_time_tokens :]

    def _get_step_mask(self, prefix: ImagePrefix, num_tokens: int):
        """Every image token sees the prompt and the image.

        A mask even where nothing is padded: without one, language models would mask causally.
        """
        if num_tokens not in prefix.masks:
            prefix.masks[num_tokens] = self._create_step_mask(prefix, num_tokens)
        return prefix.masks[num_tokens]

    def _create_step_mask(self, prefix: ImagePrefix, num_tokens: int):
        weight = self.get_input_embeddings().weight
        ones = prefix.attention_mask.new_ones(len(prefix), num_tokens)
        mask = create_bidirectional_mask(
            self.config.text_config, weight.new_empty(len(prefix), num_tokens, 0),
            torch.cat([prefix.attention_mask, ones], dim=1),
            allow_is_bidirectional_skip=False, **{CACHE: prefix.cache},
        )  # fmt: skip
        return mask[:, :, :1] if isinstance(mask, Tensor) else mask  # the same row for all of them, faster to read

    @apply_forward_hook
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]."""
        return self.model.get_latents(pixel_values)

    @apply_forward_hook
    def decode_latents(self, latents: Tensor, **kwargs) -> Tensor:
        """Pixels (B, 3, H, W) of clean latents; see `HydraTokModel.decode`."""
        return self.model.vision_tower.decode(latents, **kwargs).sample

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.5,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws one image (3, H, W) in [-1, 1] for each prompt (B, P), left-padded; `HydraPipeline` has more options.

        Args:
            generator: draws the latents; None is torch's global generator, as in `generate`.
        """
        config, device = self.config, input_ids.device
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if (input_ids[:, -1] != config.vision_start_token_id).any():
            start = input_ids.new_full((len(input_ids), 1), config.vision_start_token_id)
            input_ids = torch.cat([input_ids, start], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(start)], dim=1)
        if guidance_scale != 1 and pixel_values is not None:
            raise ValueError("Guidance for prompts with images is not supported yet; use guidance_scale=1.")
        prefix = self.prefill(input_ids, attention_mask, pixel_values)
        negative_prefix = None if guidance_scale == 1 else self._prefill_null_prompts(input_ids)
        grid = self.get_latent_grid(height, width)
        sigmas = inference_sigmas(num_inference_steps, self.get_sigma_shift(grid[0] * grid[1])).to(device)
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        shape = (len(input_ids), config.vision_config.latent_channels, *grid)
        latents = torch.randn(shape, generator=generator, device=device)
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:]):
            velocity = self.denoise_step(latents, sigma.expand(len(latents)), prefix, negative_prefix, guidance_scale)
            latents = euler_step(latents, velocity, sigma, next_sigma)
        return self.decode_latents(latents, generator=generator)

    def get_latent_grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(h, w) of the latents of an image; None is the tokenizer's own size. ValueError off the patch grid."""
        patch, default = self.config.vision_config.patch_size, self.config.vision_config.image_size
        height, width = default if height is None else height, default if width is None else width
        if height % patch or width % patch or min(height, width) < patch:
            raise ValueError(f"{height=} and {width=} must be positive multiples of the patch size {patch}.")
        return height // patch, width // patch

    def _prefill_null_prompts(self, input_ids: Tensor) -> ImagePrefix:
        null = input_ids.new_tensor(self.config.null_prompt_ids).expand(len(input_ids), -1)
        return self.prefill(null, torch.ones_like(null))
