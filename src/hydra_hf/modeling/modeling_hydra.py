"""HYDRA: one sequence of text and visual tokens, a language head and a vision head. HYDRA, section 2.2; figure 3.

noisy latents -> Sem-ViT -> projector -.                .-> lm_head     -> next token
                                        >-> LLM states -<
                 text -> embeddings ---'                `-> vision_head -> latent velocity
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .compat import CACHE, GenerationMixin, one_cache, slice_logits_to_keep
from .configuration_hydra import HydraConfig
from .image_generation import ImageGenerationMixin
from .layers import (
    TimestepEmbedding,
    first_set,
    init_layer,
    latents_to_tokens,
    sinusoidal_positions_2d,
    tokens_to_latents,
)
from .modeling_hydra_tok import HydraTokModel
from .pretrained import HydraPreTrainedMixin
from .vision_head import VisionHead


@dataclass
class HydraModelOutput(BaseModelOutputWithPast):
    """`last_hidden_state` (B, L, D); `image_hidden_states` (num_images, N, D): the part of it where pictures stand;
    `image_outputs`: what `get_image_features` gave for images that came as pixels."""

    image_hidden_states: Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class HydraOutput(CausalLMOutputWithPast):
    """`loss` is the sum of the losses that the call's targets allow; `velocity` (num_generated, C, h, w)."""

    velocity: Tensor | None = None
    language_loss: Tensor | None = None
    flow_loss: Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


def get_image_block_ids(mm_token_type_ids: Tensor, past_length: int = 0) -> Tensor:
    """k in picture k and -1 in text, (B, past + L): one block is bidirectional, all else causal.

    The masks index by absolute position, so what the cache holds is filled up with -1.
    """
    is_image = nn.functional.pad(mm_token_type_ids == 1, (past_length, 0), value=False)
    before = nn.functional.pad(is_image, (1, 0), value=False)[:, :-1]
    return torch.where(is_image, (is_image & ~before).int().cumsum(1) - 1, -1)


def check_token_types(mm_token_type_ids: Tensor, inputs_embeds: Tensor) -> None:
    """ValueError for token types of other rows than the inputs (B, L, D), or of fewer positions."""
    batch_size, length = inputs_embeds.shape[:2]
    if mm_token_type_ids.ndim != 2 or len(mm_token_type_ids) != batch_size or mm_token_type_ids.shape[1] < length:
        raise ValueError(
            f"mm_token_type_ids {tuple(mm_token_type_ids.shape)} must be {(batch_size, length)}, as input_ids."
        )


class MultiModalProjector(nn.Module):
    """Semantic states to the width of the LLM: a norm, fixed positions if the config has them, the paper's linear layer."""

    def __init__(self, config: HydraConfig):
        super().__init__()
        self.position_period = config.projector_position_period
        self.norm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.vision_config.layer_norm_eps)
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, semantic_states: Tensor, grid: tuple[int, int]) -> Tensor:
        """States (num_images, N, D) of a (h, w) grid -> (num_images, N, D_llm)."""
        states = self.norm(semantic_states)
        if self.position_period is not None:
            states = states + sinusoidal_positions_2d(grid, states.shape[-1], states, self.position_period)
        return self.linear(states)


class HydraPreTrainedModel(HydraPreTrainedMixin, PreTrainedModel):
    config: HydraConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("text", "image")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the flow loss is a mean: Trainer must divide it by the accumulation steps
    _no_split_modules = ["AdaLNZeroLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False  # flash kernels silently drop the bidirectional image blocks
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_layer(module, self.config.initializer_range)


class HydraModel(HydraPreTrainedModel):
    """Tokenizer, projector and language model; the heads are on `HydraForConditionalGeneration`."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head", r"^vision_head"]

    def __init__(self, config: HydraConfig):
        super().__init__(config)
        self.vision_tower = HydraTokModel._from_config(config.vision_config)
        self.multi_modal_projector = MultiModalProjector(config)
        self.time_embedding = TimestepEmbedding(config.text_config.hidden_size) if config.use_time_token else None
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_latents(self, pixel_values: Tensor) -> Tensor:
        """Clean latents (num_images, C, h, w): the posterior's mean, normalised."""
        return self.vision_tower.encode(pixel_values).latent_dist.mode()

    def get_image_embeds(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """What the LLM reads of images at noise level `sigma` (num_images,): (num_images, [1 +] N, D_llm)."""
        if self.config.llm_visual_input == "semantic":
            visual_states = self.vision_tower.get_semantic_states(latents)  # (num_images, N, D)
        else:
            visual_states = self.vision_tower.get_bottleneck_states(latents)
        return self._project(visual_states, tuple(latents.shape[-2:]), sigma)

    def _project(self, visual_states: Tensor, grid: tuple[int, int], sigma: Tensor) -> Tensor:
        image_embeds = self.multi_modal_projector(visual_states, grid)  # (num_images, N, D_llm)
        if self.time_embedding is None:
            return image_embeds
        return torch.cat([self.time_embedding(sigma)[:, None], image_embeds], dim=1)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """What the vision tower says of given images (num_images, 3, H, W); `pooler_output` are their embeddings, time token
        included. `kwargs` are the tower's, such as `output_hidden_states`."""
        outputs = self.vision_tower(pixel_values, **{**kwargs, "return_dict": True})
        latents, visual_states = outputs.latents, outputs.last_hidden_state  # (num_images, N, D)
        if self.config.llm_visual_input == "latent":
            visual_states = self.vision_tower.get_bottleneck_states(latents)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self._project(visual_states, tuple(latents.shape[-2:]), latents.new_zeros(len(latents))),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """Where images stand, (B, L) bool; found by embedding when there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        sigma: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HydraModelOutput:
        """Causal over text, bidirectional inside each image. A given image is a generated one at sigma 0.

        Args:
            input_ids: (B, L) with one placeholder for each image token, the time token included.
            pixel_values: (num_images, 3, H, W) in [-1, 1], in the order of their placeholders; read at sigma 0.
            latents, sigma: instead of pixels, latents (num_images, C, h, w) already at noise levels (num_images,).
            mm_token_type_ids: (B, L), 1 where images stand; found from `input_ids` when missing.
            past_key_values: the older name of `cache`.

        Raises:
            ValueError: for images given twice, latents without sigma, or placeholders that the images do not fill.
        """
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_mask = self.get_placeholder_mask(input_ids, inputs_embeds)  # (B, L)
        if mm_token_type_ids is not None:
            check_token_types(mm_token_type_ids, inputs_embeds)
        image_outputs = self._encode_images(pixel_values, latents, mm_encoder_outputs, kwargs)
        image_embeds = None
        if image_outputs is not None:
            image_embeds = image_outputs.pooler_output  # (num_images, [1 +] N, D)
        elif latents is not None:
            image_embeds = self._embed_latents(latents, sigma)
        if image_embeds is not None:
            inputs_embeds = self._place_images(inputs_embeds, image_mask, image_embeds)
        if not isinstance(attention_mask, dict):
            mm_token_type_ids = image_mask.int() if mm_token_type_ids is None else mm_token_type_ids
            attention_mask = self._create_masks(inputs_embeds, attention_mask, cache, position_ids, mm_token_type_ids)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        states = outputs.last_hidden_state  # (B, L, D)
        image_hidden_states = None
        if image_embeds is not None:
            num_images, tokens_per_image = image_embeds.shape[:2]
            places = first_set(image_mask.flatten(), num_images * tokens_per_image)
            states_of_images = states.flatten(0, 1)[places].unflatten(0, (num_images, tokens_per_image))
            image_hidden_states = states_of_images[:, self.config.num_time_tokens :]  # (num_images, N, D)
        return HydraModelOutput(
            last_hidden_state=states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_hidden_states,
            image_outputs=image_outputs,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _encode_images(self, pixel_values, latents, mm_encoder_outputs, kwargs) -> BaseModelOutputWithPooling | None:
        encoded = (mm_encoder_outputs or {}).get("image")
        if sum(source is not None for source in (pixel_values, latents, encoded)) > 1:
            raise ValueError("Give images once: as pixel_values, latents or mm_encoder_outputs.")
        if pixel_values is None:
            return encoded
        recorded = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        return self.get_image_features(pixel_values, **{**recorded, "return_dict": True})

    def _embed_latents(self, latents: Tensor, sigma: Tensor | None) -> Tensor:
        if sigma is None or sigma.shape != (len(latents),):
            shape = None if sigma is None else tuple(sigma.shape)
            raise ValueError(f"latents of {len(latents)} images need sigma of shape ({len(latents)},), got {shape}.")
        return self.get_image_embeds(latents, sigma)

    def _place_images(self, inputs_embeds: Tensor, image_mask: Tensor, image_embeds: Tensor) -> Tensor:
        num_images, tokens_per_image = image_embeds.shape[:2]
        if not torch.compiler.is_compiling() and image_mask.sum() != num_images * tokens_per_image:
            raise ValueError(
                f"{int(image_mask.sum())} image placeholders in input_ids, but {num_images} images of"
                f" {tokens_per_image} tokens (time token included) need {num_images * tokens_per_image}."
            )
        image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(image_mask[..., None].expand_as(inputs_embeds), image_embeds)

    def _create_masks(self, inputs_embeds, attention_mask, cache, position_ids, mm_token_type_ids):
        if attention_mask is None:
            # Without a mask, transformers reads jumps in the positions as packed sequences and cuts attention there.
            past_length = 0 if cache is None else cache.get_seq_length()
            attention_mask = inputs_embeds.new_ones(
                (len(inputs_embeds), past_length + inputs_embeds.shape[1]), dtype=torch.long
            )
        return HydraForConditionalGeneration.create_masks_for_generate(
            self.config, inputs_embeds, attention_mask, cache, position_ids, mm_token_type_ids
        )


class HydraForConditionalGeneration(HydraPreTrainedModel, ImageGenerationMixin, GenerationMixin):
    """HYDRA with its two heads: answers with `generate`, draws with `generate(generation_mode="image")`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: HydraConfig):
        super().__init__(config)
        if config.vision_head_config._attn_implementation is None:
            config.vision_head_config._attn_implementation = config._attn_implementation
        self.model = HydraModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.vision_head = VisionHead(config)
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        sigma: Tensor | None = None,
        is_generated: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        labels: Tensor | None = None,
        velocity_target: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HydraOutput:
        """L = L_NTP + L_FM, each where its target is given. See `HydraModel.forward` for the inputs.

        Args:
            is_generated: (num_images,) bool, the images whose velocity the vision head gives; needs `latents`.
            labels: (B, L), -100 where nothing is to be learnt.
            velocity_target: (num_generated, C, h, w), noise - latents of the generated images.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            latents=latents,
            sigma=sigma,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))  # (B, L, V)
        velocity = language_loss = flow_loss = None
        if is_generated is not None:
            num_generated = None if velocity_target is None else len(velocity_target)
            velocity = self._velocity_of(outputs.image_hidden_states, latents, sigma, is_generated, num_generated)
        if labels is not None:
            language_loss = self.loss_function(logits, labels, self.config.text_config.vocab_size, **kwargs)
        if velocity_target is not None:
            if velocity is None or velocity.shape != velocity_target.shape:
                shape = None if velocity is None else tuple(velocity.shape)
                raise ValueError(
                    f"velocity_target {tuple(velocity_target.shape)} needs is_generated and the shape of the velocity, got {shape}."
                )
            flow_loss = nn.functional.mse_loss(velocity, velocity_target.to(velocity))
        losses = [loss for loss in (language_loss, flow_loss) if loss is not None]
        return HydraOutput(
            loss=sum(losses) if losses else None,
            logits=logits,
            velocity=velocity,
            language_loss=language_loss,
            flow_loss=flow_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _velocity_of(self, image_hidden_states, latents, sigma, is_generated, num_generated: int | None) -> Tensor:
        if latents is None or is_generated.shape != (len(latents),):
            raise ValueError(
                f"is_generated {tuple(is_generated.shape)} needs latents of as many images,"
                f" got {None if latents is None else tuple(latents.shape)}."
            )
        if num_generated is None or not torch.compiler.is_compiling():
            num_generated = int(is_generated.sum())
        if num_generated == 0:
            raise ValueError(
                f"is_generated marks none of {len(latents)} images; leave it out where nothing is generated."
            )
        images = first_set(is_generated, num_generated)
        return self._draw(image_hidden_states[images], latents[images], sigma[images])

    def _draw(self, states: Tensor, noisy_latents: Tensor, sigma: Tensor) -> Tensor:
        """The vision head on states (B, N, D_llm) of image tokens: velocity (B, C, h, w)."""
        grid = tuple(noisy_latents.shape[-2:])
        return tokens_to_latents(self.vision_head(states, latents_to_tokens(noisy_latents), sigma, grid), grid)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_mode: str = "text", **kwargs):
        """Token ids, or with `generation_mode="image"` pixels (B, 3, H, W): see `generate_images`."""
        if generation_mode == "image":
            # transformers' pipelines add their defaults for text, such as max_new_tokens, to every call
            text_only = ({*vars(GenerationConfig())} | {"generation_config"}) - {"guidance_scale"}
            kwargs = {name: value for name, value in kwargs.items() if name not in text_only}
            return self.generate_images(kwargs.pop("input_ids", inputs), **kwargs)
        if generation_mode != "text":
            raise ValueError(f"{generation_mode=} must be 'text' or 'image'.")
        generation_config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size", generation_config.prefill_chunk_size) is not None:
            raise ValueError(
                "prefill_chunk_size would cut an image block in two and change the answer; leave it None."
            )
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE] = cache
        return super().generate(inputs=inputs, **kwargs)

    # Text: what GenerationMixin needs to know about images.

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, use_cache=True, mm_token_type_ids=None, **kwargs
    ):
        needs_images = is_first_iteration or not use_cache
        return super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            mm_token_type_ids=mm_token_type_ids if needs_images else None,
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, cache=None, position_ids=None, mm_token_type_ids=None,
        past_key_values=None, **kwargs,
    ):  # fmt: skip
        """transformers' masks with image blocks; `mm_token_type_ids` are of the current chunk only."""
        cache = one_cache(cache, past_key_values)
        block_ids = None
        if mm_token_type_ids is not None and (torch.compiler.is_compiling() or (mm_token_type_ids == 1).any()):
            past_length = 0 if cache is None else int(cache.get_seq_length())
            block_ids = get_image_block_ids(mm_token_type_ids[:, -inputs_embeds.shape[1] :], past_length)
        return create_masks_for_generate(
            config.get_text_config(), inputs_embeds, attention_mask, cache, position_ids,
            block_sequence_ids=block_ids,
        )  # fmt: skip


__all__ = ["HydraForConditionalGeneration", "HydraModel", "HydraPreTrainedModel"]
