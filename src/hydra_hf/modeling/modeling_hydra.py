"""HYDRA: one sequence of text and visual tokens, a language head and a vision head. HYDRA, section 2.2; figure 3.

noisy latents -> Sem-ViT -> projector -.                .-> lm_head     -> next token
                                        >-> LLM states -<
                 text -> embeddings ---'                `-> vision_head -> velocity of latents
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .compat import CACHE, GenerationMixin, one_cache, slice_logits_to_keep
from .configuration_hydra import HydraConfig
from .flow import flow_matching_loss
from .grid import (
    Grid,
    check_token_types,
    drop_leading,
    is_one_grid,
    pack_latents,
    place_images,
    run_by_grid,
    select_images,
    tokens_to_latents,
)
from .image_embedding import ImageEmbeddingMixin
from .interleaved_generation import InterleavedGenerationMixin
from .layers import TimestepEmbedding, first_set, init_layer
from .masks import choose_masks, create_masks
from .modeling_hydra_tok import HydraTokModel
from .outputs import HydraModelOutput, HydraOutput
from .pretrained import HydraPreTrainedMixin
from .projector import MultiModalProjector
from .vision_head import VisionHead


class HydraPreTrainedModel(HydraPreTrainedMixin, PreTrainedModel):
    config: HydraConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    output_modalities = ("text", "image", "video")
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


class HydraModel(ImageEmbeddingMixin, HydraPreTrainedModel):
    """Vision tower, projector and language model; the heads are in `HydraForConditionalGeneration`."""

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

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        latents: Tensor | None = None,
        sigma: Tensor | None = None,
        num_sources: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        condition_grad_scale: float = 1.0,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HydraModelOutput:
        """Attention is causal over text, bidirectional inside each image. A given image is a generated one at sigma 0.

        Args:
            input_ids: (B, L) with one placeholder for each image token, the time token included.
            pixel_values: in [-1, 1], in the order of their placeholders; read at sigma 0. (num_images, 3, H, W), or packed
                (total_patches, 3 p p), see `image_grid_thw`: patches row by row, and in each, channel before row before
                column. That is Qwen2-VL's order with one frame per patch and no merging.
            image_grid_thw: (num_images, 3), the grids (t, h, w) of packed pixels or latents, which may have any sizes; t is 1
                for images, the number of frames for pixels of clips, that of latent frames for their latents.
            pixel_values_videos, video_grid_thw: clips apart from the images: (num_clips, 3, T, H, W), or packed with their
                grids. Otherwise they are among the images.
            latents, sigma: instead of pixels, latents already at noise levels (num_images,): (num_images, C, h, w), or
                packed (total_tokens, C).
            num_sources: (num_images,), how many images directly before it an image is made from: in Sem-ViT it sees them
                (source-target interaction, HYDRA-X, section 3). 0 for all but the targets of edits.
            mm_token_type_ids: (B, L), 1 at image tokens and 2 at those of clips; None finds them in `input_ids`.
            document_ids: (B, L), which of several samples packed into a row a token belongs to, numbered from 0; instead of
                `attention_mask`. No sample attends to another, and positions restart with each.
            condition_grad_scale: factor on the gradient that reaches Sem-ViT through images at sigma 0.
            past_key_values: the older name of `cache`.

        Raises:
            ValueError: for images given twice, latents without sigma, or placeholders that the images do not fill.
        """
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        placeholder_types = self.get_placeholder_types(input_ids, inputs_embeds)  # (B, L)
        image_mask = placeholder_types > 0
        mm_token_type_ids = placeholder_types if mm_token_type_ids is None else mm_token_type_ids
        check_token_types(mm_token_type_ids, inputs_embeds)
        given = self._encode_given(
            pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, latents, mm_encoder_outputs, kwargs
        )
        image_embeds = None
        if given:
            image_embeds = self._embed_given(placeholder_types, given)  # ([1 +] N, D_llm) of each image
        elif latents is not None:
            image_embeds = self._embed_latents(latents, image_grid_thw, sigma, num_sources, condition_grad_scale)
        if image_embeds is not None:
            inputs_embeds = place_images(inputs_embeds, image_mask, image_embeds)
        attention_mask, position_ids = choose_masks(
            self.config, inputs_embeds, attention_mask, cache, position_ids, mm_token_type_ids, document_ids
        )
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
            lengths = [len(image) for image in image_embeds]
            places = first_set(image_mask.flatten(), sum(lengths))
            image_hidden_states = drop_leading(states.flatten(0, 1)[places], lengths, self.config.num_time_tokens)
        return HydraModelOutput(
            last_hidden_state=states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_hidden_states,
            image_outputs=given.get("image"),
            **{CACHE: getattr(outputs, CACHE)},
        )


class HydraForConditionalGeneration(HydraPreTrainedModel, InterleavedGenerationMixin, GenerationMixin):
    """HYDRA with its two heads: `generate` answers, in text, in images or in both, see `generation_mode`."""

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
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """See `HydraModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """See `HydraModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        latents: Tensor | None = None,
        sigma: Tensor | None = None,
        num_sources: Tensor | None = None,
        is_generated: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        condition_grad_scale: float = 1.0,
        labels: Tensor | None = None,
        velocity_target: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HydraOutput:
        """L = L_NTP + L_FM, each if its target is given. See `HydraModel.forward` for the inputs.

        Args:
            is_generated: (num_images,) bool, the images whose velocity the vision head predicts; needs `latents`.
            labels: (B, L), -100 where nothing is to be learnt. The language head then runs only at labelled positions.
            velocity_target: noise - latents of the generated images, dense or packed as the latents are. The flow loss is
                the mean squared error over all their tokens and channels.

        Raises:
            ValueError: as `HydraModel.forward`, or for a `velocity_target` without `is_generated` or of another shape.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            latents=latents,
            sigma=sigma,
            num_sources=num_sources,
            mm_token_type_ids=mm_token_type_ids,
            document_ids=document_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            condition_grad_scale=condition_grad_scale,
            use_cache=use_cache,
            **kwargs,
        )
        states, shift_labels = self._scored_states(outputs.last_hidden_state, labels, logits_to_keep)
        logits = self.lm_head(states)  # (B, L, V), or with labels (num_labelled, V)
        language_loss = velocity = flow_loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            # L_NTP
            language_loss = self.loss_function(logits, None, vocab_size, shift_labels=shift_labels, **kwargs)
        if is_generated is not None:
            count = None if velocity_target is None else len(velocity_target)
            states = outputs.image_hidden_states
            velocity = self._velocity_of(states, latents, image_grid_thw, sigma, is_generated, count)
        if velocity_target is not None:
            flow_loss = flow_matching_loss(velocity, velocity_target)  # L_FM
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

    def _scored_states(
        self, states: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The states that the language head reads, with the label of each: all in a compiled graph, otherwise labelled ones."""
        if labels is None:
            return slice_logits_to_keep(states, logits_to_keep), None  # (B, L, D)
        if torch.compiler.is_compiling():  # a graph has no shape for the labelled positions
            return states, nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        is_labelled = labels[:, 1:] != -100
        return states[:, :-1][is_labelled], labels[:, 1:][is_labelled]  # (num_labelled, D)

    def _velocity_of(
        self, image_hidden_states, latents, image_grid_thw, sigma, is_generated, num_generated: int | None
    ) -> Tensor:
        if latents is None:
            raise ValueError(f"is_generated {tuple(is_generated.shape)} needs latents of as many images, got None.")
        tokens, grids = pack_latents(latents, image_grid_thw)
        if is_generated.shape != (len(grids),):
            raise ValueError(
                f"is_generated {tuple(is_generated.shape)} needs latents of as many images, got {len(grids)}."
            )
        if num_generated is None or not torch.compiler.is_compiling():
            num_generated = int(is_generated.sum())
        if num_generated == 0:
            raise ValueError(f"is_generated marks none of {len(grids)} images; leave it out if nothing is generated.")
        images = first_set(is_generated, num_generated)
        packed = [select_images(tensor, grids, images) for tensor in (image_hidden_states, tokens)]
        if is_one_grid(grids):
            grids = grids[:num_generated]
        else:
            grids = [grids[index] for index in images.tolist()]
        velocity = self._predict_velocity(*packed, sigma[images], grids)
        if image_grid_thw is not None:
            return velocity
        return tokens_to_latents(velocity.unflatten(0, (num_generated, -1)), grids[0])

    def _predict_velocity(self, states: Tensor, noisy_tokens: Tensor, sigma: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The packed velocity (total_tokens, C) that the vision head predicts from packed states (total_tokens, D_llm) and
        noisy latents."""
        config = self.config.vision_head_config
        return run_by_grid(self.vision_head, grids, [states, noisy_tokens], [sigma], config=config)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_mode: str = "text", **kwargs):
        """Token ids; with `generation_mode="image"` pixels (B, 3, H, W) in [-1, 1], see `generate_images`; with "interleaved"
        both, see `generate_interleaved`."""
        if generation_mode == "image":
            # transformers' pipelines add their defaults for text, such as max_new_tokens, to every call
            text_only = ({*vars(GenerationConfig())} | {"generation_config"}) - {"guidance_scale"}
            kwargs = {name: value for name, value in kwargs.items() if name not in text_only}
            return self.generate_images(kwargs.pop("input_ids", inputs), **kwargs)
        if generation_mode == "interleaved":
            return self.generate_interleaved(kwargs.pop("input_ids", inputs), **kwargs)
        if generation_mode != "text":
            raise ValueError(f"{generation_mode=} must be 'text', 'image' or 'interleaved'.")
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
        """transformers' masks with image blocks; `mm_token_type_ids` cover only the current chunk."""
        cache = one_cache(cache, past_key_values)
        return create_masks(config, inputs_embeds, attention_mask, cache, position_ids, mm_token_type_ids)


__all__ = ["HydraForConditionalGeneration", "HydraModel", "HydraPreTrainedModel"]
