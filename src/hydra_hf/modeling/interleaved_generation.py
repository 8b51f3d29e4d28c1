"""Text and images in one answer: the model draws where it writes <|vision_start|>, reads its image and continues. HYDRA, 2.2.

prompt -> text -> <|vision_start|> -> clean image, read at sigma 0 -> <|vision_end|> -> text -> <|im_end|>
                          `-> steps from noise to the image, which read the cache and write nothing
"""

import copy

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig

from .grid import Grid, image_grids, num_tokens, pack_dense, tokens_to_latents
from .image_generation import GuidanceBranch, ImageGenerationMixin, ImagePrefix, classifier_free
from .outputs import HydraInterleavedOutput
from .prefix_cache import FrozenPrefixCache


PROMPT_INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids")
MAX_NEW_TOKENS = 256  # as in transformers' pipelines


class InterleavedGenerationMixin(ImageGenerationMixin):
    """Answers of text and images; needs `GenerationMixin` too."""

    @torch.no_grad()
    def generate_interleaved(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.5,
        generator: torch.Generator | None = None,
        max_images: int = 4,
        source_interaction: bool = False,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> HydraInterleavedOutput:
        """The answer to one conversation (1, P), in text and images.

        Every token of the prompt and of the answer goes through the language model once; what draws an image comes on top.

        Args:
            input_ids: up to where the assistant's turn begins. A prompt that ends with <|vision_start|> is answered by an image.
            height, width: of every image, in pixels; None is the tokenizer's own size.
            guidance_scale: leads away from the empty prompt; 1 or less turns guidance off.
            generator: draws the latents of an image and the decoder's noise, then those of the next image.
            max_images: after as many, the answer continues in text only.
            source_interaction: every image is drawn as an edit of the one before it, if there is one (HYDRA-X, section 3).
            kwargs: the images of the prompt, see `HydraModel.forward`, and what `generate` takes for text. `max_new_tokens`,
                256 by default, counts text and <|vision_start|>, but not the rest of an image.

        Raises:
            ValueError: for several rows, beams or answers, a cache of the caller's, or an image that does not fit the context.
        """
        prompt_inputs = {name: kwargs.pop(name) for name in PROMPT_INPUTS if name in kwargs}
        ids, prompt_inputs = _without_padding(input_ids, attention_mask, prompt_inputs)
        config = copy.deepcopy(generation_config or self.generation_config)
        options = config.update(**kwargs)  # what is left is not in the config, such as logits_processor
        _check_text_options(config, options, max_images)
        num_left = config.max_new_tokens or self.generation_config.max_new_tokens or MAX_NEW_TOKENS
        prompt_length, start_id = ids.shape[1], self.config.vision_start_token_id
        grid = self.get_latent_grid(height, width)
        cache, images, latents = DynamicCache(config=self.config.text_config), [], []
        source = self.last_image(prompt_inputs) if source_interaction else None
        while True:
            if num_left and ids[0, -1] != start_id:
                text_config = self.text_config(config, num_left, can_draw=len(images) < max_images)
                longer = self.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache, generation_config=text_config,
                    **prompt_inputs, **options,
                )  # fmt: skip
                num_left -= longer.shape[1] - ids.shape[1]
                ids, prompt_inputs = longer, {}
            if ids[0, -1] != start_id:
                break
            self._check_context(torch.ones_like(ids), [grid])
            self.model(ids[:, cache.get_seq_length() :], cache=cache, use_cache=True, **prompt_inputs)
            branches = self.branches_after(ids, cache, guidance_scale, source)
            tokens = self.sample_latents(branches, [grid], num_inference_steps, generator)
            source = (tokens, grid) if source_interaction else None
            latents.append(tokens_to_latents(tokens[None], grid))
            images.append(self.decode_latents(latents[-1], generator=generator)[0])
            ids, prompt_inputs = self.read_again(ids, cache, grid, tokens), {}
        return HydraInterleavedOutput(sequences=ids, prompt_length=prompt_length, images=images, latents=latents)

    def text_config(self, config: GenerationConfig, num_left: int, can_draw: bool) -> GenerationConfig:
        """`config` for the text up to the end of the turn or to the next image."""
        config, start_id = copy.deepcopy(config), self.config.vision_start_token_id
        ends = self.generation_config.eos_token_id if config.eos_token_id is None else config.eos_token_id
        config.eos_token_id = [start_id, *([ends] if isinstance(ends, int) else ends or [])]
        placeholders = [self.config.image_token_id, self.config.video_token_id]  # never text
        suppressed = [token for token in placeholders if token is not None] + ([] if can_draw else [start_id])
        config.suppress_tokens = [*(config.suppress_tokens or []), *suppressed]
        config.max_new_tokens, config.use_cache, config.return_dict_in_generate = num_left, True, False
        return config

    def branches_after(
        self, ids: Tensor, cache: Cache, guidance_scale: float, source: tuple[Tensor, Grid] | None = None
    ) -> list[GuidanceBranch]:
        """The branches of an image after `ids` (1, P), all of which are in the cache; of an edit, the latents of its source are
        given."""
        sources = None if source is None or not self.model.interacts else self.model.encode_source(*source)
        prefix = ImagePrefix(FrozenPrefixCache.from_cache(cache), torch.ones_like(ids), sources=sources)
        if guidance_scale > 1:
            return classifier_free(prefix, self._prefill_null_prompts(ids), guidance_scale)
        return [GuidanceBranch(prefix)]

    def last_image(self, prompt_inputs: dict) -> tuple[Tensor, Grid] | None:
        """The latents (N, C) of the last image of a prompt, and their grid; None without images."""
        pixel_values, image_grid_thw = (prompt_inputs.get(name) for name in ("pixel_values", "image_grid_thw"))
        if pixel_values is None:
            return None
        if image_grid_thw is None:
            pixel_values, image_grid_thw = pack_dense(pixel_values, self.config.vision_config.patch_size)
        grid = image_grids(image_grid_thw)[-1]
        tokens = self.model.get_latents(pixel_values[-num_tokens(grid) :], image_grid_thw[-1:])
        return tokens, self.model.get_latent_grids([grid])[0]

    def read_again(self, ids: Tensor, cache: Cache, grid: Grid, tokens: Tensor) -> Tensor:
        """Runs the finished image at sigma 0, so that what follows sees no noise. Returns `ids` with the image and its end."""
        placeholders = ids.new_full((1, self.config.num_time_tokens + len(tokens)), self.config.image_token_id)
        self.model(
            placeholders, latents=tokens, image_grid_thw=torch.tensor([grid]), sigma=tokens.new_zeros(1), cache=cache,
            use_cache=True,
        )  # fmt: skip
        return torch.cat([ids, placeholders, ids.new_full((1, 1), self.config.vision_end_token_id)], dim=1)


def _without_padding(
    input_ids: Tensor | None, attention_mask: Tensor | None, prompt_inputs: dict
) -> tuple[Tensor, dict]:
    """One row (1, P) and its inputs. Raises ValueError for another number of rows."""
    shape = None if input_ids is None else tuple(input_ids.shape)
    if shape is None or len(shape) != 2 or shape[0] != 1 or shape[1] == 0:
        raise ValueError(
            f"Got input_ids of shape {shape}, expected (1, P): generation_mode='interleaved' answers one conversation."
        )
    if attention_mask is None:
        return input_ids, prompt_inputs
    is_own, types = attention_mask[0].bool(), prompt_inputs.get("mm_token_type_ids")
    if types is not None:
        prompt_inputs = prompt_inputs | {"mm_token_type_ids": types[:, is_own]}
    return input_ids[:, is_own], prompt_inputs


def _check_text_options(config: GenerationConfig, options: dict, max_images: int) -> None:
    """Raises ValueError for what a single answer with a cache of its own cannot have."""
    if not isinstance(max_images, int) or max_images < 1:
        raise ValueError(f"Got {max_images=}, expected at least 1; generation_mode='text' draws none.")
    for name in ("num_beams", "num_return_sequences"):
        if getattr(config, name) not in (None, 1):
            raise ValueError(f"Got {name}={getattr(config, name)}, expected 1 with generation_mode='interleaved'.")
    if given := {"cache", "past_key_values", "inputs_embeds"} & set(options):
        raise ValueError(
            f"Got {sorted(given)}, expected input_ids alone: generation_mode='interleaved' has a cache of its own."
        )
