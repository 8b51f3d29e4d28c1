"""Generation of images and clips with HYDRA: the prompt runs once, then only their tokens, step by step. HYDRA, section 2.2;
edits see their sources in Sem-ViT: HYDRA-X, section 3."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_bidirectional_mask

from .compat import CACHE
from .flow import euler_step, expand_sigma, inference_sigmas, resolution_shift
from .grid import (
    Grid,
    image_grid,
    is_one_grid,
    noise_tokens,
    num_tokens,
    pack_latents,
    per_token,
    run_by_grid,
    split_images,
    tokens_to_latents,
    unpatchify,
)
from .prefix_cache import FrozenPrefixCache, join_rows, pad_left
from .source_interaction import SourceStates


def guide(velocities: list[Tensor], weights: list[Tensor], rescale: Tensor) -> Tensor:
    """Guided velocity (B, ...) of the branches' velocities, each sample by itself; `weights` and `rescale` are (B,).

    The sum over branches of weight * (velocity - velocity of the previous branch), with zero before the first. Two branches
    of weights 1 and s, the negative prompt first, are classifier-free guidance of scale s.
    `rescale` in [0, 1] brings the spread of a guided sample back to that of the last branch (Lin et al. 2023, section 3.4).
    """
    guided = expand_sigma(weights[0], velocities[0]) * velocities[0]
    for before, velocity, weight in zip(velocities, velocities[1:], weights[1:]):
        guided = guided + expand_sigma(weight, velocity) * (velocity - before)
    ratio = _spread(velocities[-1]) / _spread(guided).clamp(min=1e-8)  # a new head gives 0 everywhere
    return guided * (1 + expand_sigma(rescale, guided) * (ratio - 1))


def _guide_rows(*rows: Tensor, grids: Sequence[Grid]) -> Tensor:
    """`guide` with its arguments in a flat list: velocities, as many weights, and the rescale."""
    number = len(rows) // 2
    return guide(list(rows[:number]), list(rows[number : 2 * number]), rows[-1])


def _spread(samples: Tensor) -> Tensor:
    return expand_sigma(samples.flatten(1).std(dim=1), samples)


def _per_sample(value: float | Tensor, num_images: int, device: torch.device) -> Tensor:
    """(B,) from one number or B of them; a tensor, since a compiled step would be compiled again for every number."""
    value = torch.as_tensor(value, dtype=torch.float32, device=device)
    if value.numel() not in (1, num_images):
        raise ValueError(
            f"Guidance of {value.numel()} values does not fit {num_images} images, expected one for each."
        )
    return value.reshape(-1).expand(num_images).contiguous()


@dataclass
class ImagePrefix:
    """Prefilled prompts, one for each image: those to generate, or the negative ones that guidance leads away from."""

    cache: FrozenPrefixCache
    attention_mask: Tensor  # (B, P)
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # tokens of each image -> mask (B, 1, 1, P + N)
    sources: SourceStates | None = None  # of edits: what Sem-ViT sees of the images in the prompts

    def __len__(self) -> int:
        return len(self.attention_mask)

    def repeat_interleave(self, repeats: int) -> "ImagePrefix":
        """Each row `repeats` times; this prefix is used up."""
        if repeats == 1:
            return self
        self.cache.batch_repeat_interleave(repeats)
        sources = None if self.sources is None else self.sources.repeat_interleave(repeats)
        attention_mask = self.attention_mask.repeat_interleave(repeats, dim=0)
        return ImagePrefix(self.cache, attention_mask, sources=sources)

    @classmethod
    def joined(cls, prefixes: Sequence["ImagePrefix"]) -> "ImagePrefix":
        """The rows of several prefixes, shorter prompts padded on the left, so that images of several users share each step.

        Raises ValueError if some have sources and some have none, or sources of several sizes.
        """
        if len(prefixes) == 1:
            return prefixes[0]
        length = max(prefix.attention_mask.shape[1] for prefix in prefixes)
        attention_mask = torch.cat([pad_left(prefix.attention_mask, length, dim=-1) for prefix in prefixes])
        sources = SourceStates.stacked([prefix.sources for prefix in prefixes])
        return cls(join_rows([prefix.cache for prefix in prefixes]), attention_mask, sources=sources)


@dataclass
class GuidanceBranch:
    """Prompts, and the weight of what they add to the previous branch, one number or (B,); see `guide`."""

    prefix: ImagePrefix
    weight: float | Tensor = 1.0


def classifier_free(prefix: ImagePrefix, negative_prefix: ImagePrefix, scale: float | Tensor) -> list[GuidanceBranch]:
    """The branches of plain guidance: from the negative prompts `scale` times the way to the prompts."""
    return [GuidanceBranch(negative_prefix), GuidanceBranch(prefix, scale)]


def image_and_text(
    prefix: ImagePrefix, source_prefix: ImagePrefix, null_prefix: ImagePrefix, image_scale: float | Tensor,
    scale: float | Tensor,
) -> list[GuidanceBranch]:  # fmt: skip
    """The branches of edits (Brooks et al. 2023, eq. 3): from nothing `image_scale` times the way to the sources alone, from there
    `scale` times the way to sources and instruction."""
    return [GuidanceBranch(null_prefix), GuidanceBranch(source_prefix, image_scale), GuidanceBranch(prefix, scale)]


class ImageGenerationMixin:
    """For images what `GenerationMixin` is for text; needs `model`, `vision_head` and a `HydraConfig`."""

    def get_sigma_shift(self, num_tokens: int) -> float:
        """The shift of the noise levels for latents of `num_tokens`, the same in training and in sampling."""
        if self.config.sigma_shift is not None:
            return float(self.config.sigma_shift)
        return resolution_shift(num_tokens * self.config.vision_config.latent_channels)

    @apply_forward_hook
    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None, pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None, *, source_interaction: bool = False,
    ) -> ImagePrefix:  # fmt: skip
        """Runs prompts (B, P), left-padded, that end with <|vision_start|>; their cache is read-only from then on.

        Args:
            pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw: given images and clips, see `HydraModel.forward`.
            source_interaction: for an edit, whose target sees the given images in Sem-ViT (HYDRA-X, section 3).

        Raises ValueError for another last token, and for an edit without images, or with other images in each prompt.
        """
        if (input_ids[:, -1] != self.config.vision_start_token_id).any():
            raise ValueError(
                f"A prompt for an image must end with vision_start_token_id={self.config.vision_start_token_id};"
                f" the last tokens are {input_ids[:, -1].tolist()}. Pad on the left."
            )
        images = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        sources = None
        if source_interaction and pixel_values is None:
            raise ValueError("An edit needs the images that it changes, got pixel_values=None.")
        if source_interaction and self.model.interacts:
            sources, features = self.model.encode_sources(pixel_values, image_grid_thw, len(input_ids))
            images = {"mm_encoder_outputs": {"image": features}}
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.config.text_config)
        self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, use_cache=True,
            pixel_values_videos=pixel_values_videos, video_grid_thw=video_grid_thw, **images,
        )  # fmt: skip
        return ImagePrefix(FrozenPrefixCache.from_cache(cache), attention_mask, sources=sources)

    @apply_forward_hook
    def denoise_step(
        self,
        latents: Tensor,
        sigma: Tensor,
        branches: list[GuidanceBranch],
        guidance_rescale: float | Tensor = 0.0,
        image_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """The guided velocity at `sigma` (B,), in the form of the latents: (B, C, [T',] h, w), or packed (total_tokens, C), any
        sizes.

        Guidance goes from branch to branch, the full condition last. Only image tokens run; Sem-ViT runs once for all
        branches with the same sources and the language head not at all. A branch is as long as its own prompts: an empty negative prompt is not
        padded to a long prompt.

        Args:
            guidance_rescale: one number, or (B,); see `guide`.
            image_grid_thw: (B, 3), the grids of packed latents.

        Raises:
            ValueError: if there is no branch, or a prefix or weight does not have as many rows as there are images.
        """
        if not branches:
            raise ValueError("Got no branches, expected at least one.")
        tokens, grids = pack_latents(latents, image_grid_thw)
        prefixes = [branch.prefix for branch in branches]
        for prefix in prefixes:
            if len(prefix) != len(grids):
                raise ValueError(f"A prefix of {len(prefix)} rows does not fit latents of {len(grids)} images.")
        lengths = tuple(self.config.num_time_tokens + num_tokens(grid) for grid in grids)
        masks = [self._get_step_mask(prefix, lengths) for prefix in prefixes]
        *weights, rescale = (
            _per_sample(value, len(grids), latents.device)
            for value in (*(branch.weight for branch in branches), guidance_rescale)
        )
        velocity = self._guided_velocity(tokens, grids, sigma, prefixes, masks, weights, rescale)
        if image_grid_thw is not None:
            return velocity
        return tokens_to_latents(velocity.unflatten(0, (len(grids), -1)), grids[0])

    def compile_denoise_step(self, **kwargs) -> None:
        """Compiles what `denoise_step` computes, to generate many images; `kwargs` are those of `torch.compile`.

        A graph serves all prompts of one padded length: let the tokenizer, or the pipeline, `pad_to_multiple_of` 64.
        """
        step = torch.compile(type(self)._guided_velocity, **{"fullgraph": True, **kwargs})
        self._guided_velocity = MethodType(step, self)  # a method, so that a deep copy compiles its own weights

    def _guided_velocity(self, tokens, grids, sigma, prefixes, masks, weights, rescale) -> Tensor:
        embeds, velocities = [], []
        for prefix, mask in zip(prefixes, masks):
            known = [each for each, earlier in zip(embeds, prefixes) if earlier.sources is prefix.sources]
            embeds += known[:1] or [self.model.get_image_embeds(tokens, sigma, grids, sources=prefix.sources)]
            states = self._image_states(embeds[-1], grids, prefix, mask)  # packed (total_tokens, D_llm)
            velocities.append(self._predict_velocity(states, tokens, sigma, grids))
        return run_by_grid(_guide_rows, grids, velocities, [*weights, rescale])

    def _image_states(self, embeds: Tensor, grids: Sequence[Grid], prefix: ImagePrefix, mask: Tensor) -> Tensor:
        """States of the images' patches (total_tokens, D_llm); each image is a padded row of its own after its prompt."""
        num_leading, is_even = self.config.num_time_tokens, is_one_grid(grids)
        if is_even:
            rows = embeds.unflatten(0, (len(grids), -1))
        else:
            rows = nn.utils.rnn.pad_sequence(split_images(embeds, grids, num_leading), batch_first=True)
        outputs = self.model.language_model(
            inputs_embeds=rows.to(self.get_input_embeddings().weight.dtype), attention_mask=mask,
            position_ids=prefix.attention_mask.sum(-1, keepdim=True) + torch.arange(rows.shape[1], device=rows.device),
            use_cache=True, **{CACHE: prefix.cache},
        )  # fmt: skip
        states = outputs.last_hidden_state[:, num_leading:]
        if is_even:
            return states.flatten(0, 1)
        return torch.cat([row[: num_tokens(grid)] for row, grid in zip(states, grids)])

    def _get_step_mask(self, prefix: ImagePrefix, lengths: tuple[int, ...]):
        """Every token of an image, `lengths` of them in each row, attends to the prompt and the image.

        There is a mask even without padding: otherwise language models would mask causally.
        """
        if lengths not in prefix.masks:
            prefix.masks[lengths] = self._create_step_mask(prefix, lengths)
        return prefix.masks[lengths]

    def _create_step_mask(self, prefix: ImagePrefix, lengths: tuple[int, ...]):
        weight, attention_mask = self.get_input_embeddings().weight, prefix.attention_mask
        places = torch.arange(max(lengths), device=attention_mask.device)
        is_image = places < torch.tensor(lengths, device=attention_mask.device)[:, None]
        mask = create_bidirectional_mask(
            self.config.text_config, weight.new_empty(len(prefix), max(lengths), 0),
            torch.cat([attention_mask, is_image.to(attention_mask.dtype)], dim=1),
            allow_is_bidirectional_skip=False, **{CACHE: prefix.cache},
        )  # fmt: skip
        return mask[:, :, :1] if isinstance(mask, Tensor) else mask  # the same row for all of them, faster to read

    @apply_forward_hook
    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Tensor:
        """Clean latents of pixels in [-1, 1], both dense or both packed: see `HydraModel.get_latents`."""
        return self.model.get_latents(pixel_values, image_grid_thw)

    @apply_forward_hook
    def decode_latents(
        self, latents: Tensor, image_grid_thw: Tensor | None = None, *, num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None, **kwargs,
    ) -> Tensor | list[Tensor]:  # fmt: skip
        """Pixels (B, 3, [T,] H, W) of clean latents, see `HydraTokModel.decode`; for packed latents, a list of (3, [T,] H, W)."""
        tower, options = self.model.vision_tower, {"num_inference_steps": num_inference_steps}
        if image_grid_thw is None:
            return tower.decode(latents, generator=generator, **options, **kwargs).sample
        tokens, grids = pack_latents(latents, image_grid_thw)
        packed = [tokens]
        if tower.decodes_from_noise:
            generators = generator if isinstance(generator, list) else [generator] * len(grids)
            noise = [tower.get_decoder_noise([grid], tokens.device, one) for grid, one in zip(grids, generators)]
            packed.append(torch.cat(noise, dim=1)[0])
        decode = partial(tower.decode_rows, **options)
        patches = run_by_grid(decode, grids, packed, config=tower.config.decoder_config).to(latents.dtype)
        patch_size, ratio = tower.config.patch_size, tower.config.temporal_compression_ratio
        grids = [(1 + (num_frames - 1) * ratio, height, width) for num_frames, height, width in grids]
        images = zip(split_images(patches, grids), grids)
        return [unpatchify(image[None], patch_size, grid)[0] for image, grid in images]

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        *,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        num_frames: int | None = None,
        source_interaction: bool = False,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor | list[Tensor]:
        """One image (3, H, W) in [-1, 1], or clip (3, T, H, W), for each prompt (B, P), left-padded; `HydraPipeline` has more
        options.

        Args:
            pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw: the images and clips in the prompts, see
                `HydraModel.forward`.
            height, width: in pixels, one for all images or one for each; images of several sizes are returned as a list.
            num_frames: of clips, 1 + 4n; None for images.
            source_interaction: edits the images in the prompts, see `prefill`.
            guidance_scale: 1 or less turns guidance off, as in diffusers.
            generator: one for all, or one for each image; it draws the latents, then the decoder's noise. None is torch's
                global generator, as in `generate`.

        Raises:
            ValueError: if a prompt and its image do not fit the context, or sizes are off the patch grid or not as many as
                the prompts.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        start_id = self.config.vision_start_token_id
        if (input_ids[:, -1] != start_id).any():
            start = input_ids.new_full((len(input_ids), 1), start_id)
            input_ids = torch.cat([input_ids, start], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(start)], dim=1)
        if guidance_scale > 1 and (pixel_values is not None or pixel_values_videos is not None):
            raise ValueError(
                f"Got {guidance_scale=} for prompts with images, expected 1: only HydraPipeline guides edits, by its own branches."
            )
        grids = self._get_latent_grids(height, width, len(input_ids), num_frames)
        self._check_context(attention_mask, grids)
        prefix = self.prefill(
            input_ids, attention_mask, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw,
            source_interaction=source_interaction,
        )  # fmt: skip
        branches = [GuidanceBranch(prefix)]
        if guidance_scale > 1:
            branches = classifier_free(prefix, self._prefill_null_prompts(input_ids), guidance_scale)
        tokens = self.sample_latents(branches, grids, num_inference_steps, generator)
        if not is_one_grid(grids):
            return self.decode_latents(tokens, torch.tensor(grids), generator=generator)
        latents = tokens_to_latents(tokens.unflatten(0, (len(grids), -1)), grids[0])
        return self.decode_latents(latents, generator=generator)

    def sample_latents(
        self, branches: list[GuidanceBranch], grids: list[Grid], num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:  # fmt: skip
        """Packed clean latents (total_tokens, C) of images of these grids: noise, then Euler steps."""
        device = branches[-1].prefix.attention_mask.device
        sigmas = [inference_sigmas(num_inference_steps, self.get_sigma_shift(num_tokens(grid))) for grid in grids]
        sigmas = nn.functional.pad(torch.stack(sigmas, dim=1), (0, 0, 0, 1)).to(device)  # (steps + 1, B)
        tokens = noise_tokens(grids, self.config.vision_config.latent_channels, generator, device)
        grid_thw = torch.tensor(grids)  # on the CPU: it is read at each step
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:]):
            velocity = self.denoise_step(tokens, sigma, branches, image_grid_thw=grid_thw)
            tokens = euler_step(tokens, velocity, *(per_token(each, grids)[:, None] for each in (sigma, next_sigma)))
        return tokens

    def get_latent_grid(self, height: int | None, width: int | None, num_frames: int | None = None) -> Grid:
        """The grid of the latents of an image, or of a clip of `num_frames`; None is the tokenizer's own size, and an image.

        Raises ValueError for sizes off the patch grid, and clips that the tokenizer does not have.
        """
        config = self.config.vision_config
        height, width = (config.image_size if size is None else size for size in (height, width))
        _, h, w = image_grid(height, width, config.patch_size)
        return self.model.get_latent_grids([(1 if num_frames is None else num_frames, h, w)])[0]

    def _get_latent_grids(self, height, width, num_images: int, num_frames: int | None) -> list[Grid]:
        sizes = [
            [size] * num_images if size is None or isinstance(size, int) else list(size) for size in (height, width)
        ]
        if any(len(size) != num_images for size in sizes):
            raise ValueError(f"Got {height=} and {width=} for {num_images} prompts, expected one, or one for each.")
        return [self.get_latent_grid(*size, num_frames) for size in zip(*sizes)]

    def _check_context(self, attention_mask: Tensor, grids: list[Grid]) -> None:
        context = self.config.text_config.max_position_embeddings
        for index, (length, grid) in enumerate(zip(attention_mask.sum(-1).tolist(), grids)):
            num_image_tokens = self.config.num_time_tokens + num_tokens(grid)
            if length + num_image_tokens > context:
                raise ValueError(
                    f"Prompt {index} has {length} tokens and its image {num_image_tokens}, expected at most {context} together:"
                    " the context of the language model."
                )

    def _prefill_null_prompts(self, input_ids: Tensor) -> ImagePrefix:
        null = input_ids.new_tensor(self.config.null_prompt_ids).expand(len(input_ids), -1)
        return self.prefill(null, torch.ones_like(null))
