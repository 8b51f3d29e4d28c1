"""The OpenUni kind under UniMRG: a language model sees, queries read it, a diffusion model paints. UniMRG, section 4.1.

InternVL is from transformers, SANA and its autoencoder from diffusers; the queries, the connector and the loss are here.
"""

from collections.abc import Callable
from dataclasses import field

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hydra_hf.modeling import HydraImageProcessor
from hydra_hf.modeling.compat import ConfigOfParts, SubConfigSpec
from hydra_hf.modeling.flow import add_noise, inference_sigmas, velocity_target
from hydra_hf.modeling.processing_hydra import CHAT_TEMPLATE

from . import PaintingOutput, UnifiedProcessor


@strict
class OpenUniConfig(ConfigOfParts):
    """Sizes of the four parts.

    Args:
        transformer_config, autoencoder_config: those of SANA and its autoencoder in diffusers.
        num_queries, num_connector_layers, num_connector_heads: what reads the language model; OpenUni has 256 queries and 6
            layers.
        null_prompt_ids: the empty prompt up to the image, for guidance; [] turns guidance off.
        num_inference_steps: denoising steps for a painted image.
    """

    model_type = "unimrg_openuni"
    sub_configs_defaults = {"vlm_config": SubConfigSpec(config_class=InternVLConfig)}

    vlm_config: dict | InternVLConfig | None = None
    transformer_config: dict = field(default_factory=dict)
    autoencoder_config: dict = field(default_factory=dict)
    num_queries: int = 256
    num_connector_layers: int = 6
    num_connector_heads: int = 16
    null_prompt_ids: list[int] = field(default_factory=list)
    num_inference_steps: int = 20

    @property
    def text_config(self):
        return self.vlm_config.text_config


class OpenUniChatProcessor(UnifiedProcessor):
    """Chats in InternVL's format."""

    image_token = "<IMG_CONTEXT>"
    vision_start_token = "<img>"
    vision_end_token = "</img>"

    @classmethod
    def from_internvl(cls, own: InternVLProcessor, config: InternVLConfig, image_size: int) -> "OpenUniChatProcessor":
        """For given and painted images with sides of `image_size` pixels, a multiple of 32."""
        image_processor = HydraImageProcessor(size={"height": image_size, "width": image_size}, patch_size=32)
        template = CHAT_TEMPLATE.read_text(encoding="utf-8")
        template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<img><IMG_CONTEXT></img>")
        return cls(
            image_processor, own.tokenizer, num_image_tokens=config.image_seq_length, chat_template=template, own=own
        )


class OpenUniForUniMRG(PreTrainedModel):
    """InternVL, queries and a connector, SANA and its autoencoder, saved and opened as one model."""

    config_class = OpenUniConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    frozen_modules = ("vlm.model.vision_tower", "vlm.model.language_model.embed_tokens", "autoencoder")
    adapted_modules = ("vlm.model.language_model",)

    def __init__(self, config: OpenUniConfig):
        super().__init__(config)
        if config.transformer_config.get("interpolation_scale") is not None:
            raise ValueError("Got a SANA with a table of positions (interpolation_scale), expected one without.")
        self.vlm = InternVLForConditionalGeneration._from_config(config.vlm_config)
        self.transformer = SanaTransformer2DModel.from_config(config.transformer_config)
        self.autoencoder = AutoencoderDC.from_config(config.autoencoder_config)
        width = config.text_config.hidden_size
        self.queries = nn.Embedding(config.num_queries, width)
        layer = nn.TransformerEncoderLayer(
            width, config.num_connector_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.connector = nn.TransformerEncoder(layer, config.num_connector_layers, enable_nested_tensor=False)
        self.connector_proj = nn.Linear(width, self.transformer.config.caption_channels)
        self.post_init()

    @classmethod
    def assemble(
        cls,
        vlm: InternVLForConditionalGeneration,
        transformer: SanaTransformer2DModel,
        autoencoder: AutoencoderDC,
        **config,
    ) -> "OpenUniForUniMRG":
        """A model made of pretrained parts; the queries and the connector are new. `config` are fields of `OpenUniConfig`."""
        parts = {"transformer_config": transformer.config, "autoencoder_config": autoencoder.config}
        sizes = {
            part: {name: value for name, value in values.items() if not name.startswith("_")}
            for part, values in parts.items()
        }
        model = cls(OpenUniConfig(vlm_config=vlm.config, **sizes, **config))
        model.vlm, model.transformer, model.autoencoder = vlm, transformer, autoencoder
        return model

    def train(self, mode: bool = True) -> "OpenUniForUniMRG":
        super().train(mode)
        self.autoencoder.eval()
        return self

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Saves weights under their parameters' names: a resumed run would not find the library's old names of InternVL."""
        super().save_pretrained(save_directory, save_original_format=False, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        generators: list[torch.Generator] | None = None,
    ):
        """InternVL's own output, or with `target_pixel_values` a `PaintingOutput`."""
        if target_pixel_values is None:
            pixel_values = None if pixel_values is None else self.to_internvl(pixel_values)
            return self.vlm(
                input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, labels=labels
            )
        condition = self.encode_prompts(input_ids, attention_mask, pixel_values)
        return PaintingOutput(loss=self.flow_loss(condition, target_pixel_values, generators))

    def to_internvl(self, pixel_values: Tensor) -> Tensor:
        """Pixels in [-1, 1] to the input of InternVL: in its size, with ImageNet's statistics."""
        size = tuple(self.config.vlm_config.vision_config.image_size)
        if pixel_values.shape[-2:] != size:
            pixel_values = nn.functional.interpolate(pixel_values, size, mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = (pixel_values.new_tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        return (pixel_values / 2 + 0.5 - mean) / std

    def encode_prompts(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """What the queries after a prompt read from it: (B, num_queries, caption_channels)."""
        vlm, config = self.vlm.model, self.config.vlm_config
        embeds = vlm.get_input_embeddings()(input_ids)  # (B, L, D)
        if pixel_values is not None:
            features = vlm.get_image_features(
                self.to_internvl(pixel_values),
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
            ).pooler_output.to(embeds.dtype)
            embeds = embeds.masked_scatter(vlm.get_placeholder_mask(input_ids, embeds, features), features)
        queries = self.queries.weight.expand(len(embeds), -1, -1)  # (B, Q, D)
        hidden_states = vlm.language_model(
            inputs_embeds=torch.cat([embeds, queries.to(embeds.dtype)], dim=1),
            use_cache=False,
            attention_mask=nn.functional.pad(attention_mask, (0, queries.shape[1]), value=1),
        ).last_hidden_state[:, -queries.shape[1] :]
        return self.connector_proj(self.connector(hidden_states))  # (B, Q, C)

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]."""
        return self.autoencoder.encode(pixel_values).latent * self.autoencoder.config.scaling_factor

    def predict_velocity(self, noisy_latents: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """SANA's velocity (B, C, h, w) at `sigma` (B,), given the condition (B, Q, C) of `encode_prompts`."""
        timestep = 1000 * sigma * self.transformer.config.timestep_scale
        return self.transformer(noisy_latents, encoder_hidden_states=condition, timestep=timestep).sample

    def flow_loss(self, condition: Tensor, pixel_values: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Flow matching at uniform noise levels, as in OpenUni; each row's noise is from its own generator."""
        latents = self.encode_images(pixel_values).float()
        sigma = per_row(generators, lambda generator: torch.rand((), generator=generator)).to(latents.device)
        noise = per_row(generators, lambda generator: torch.randn(latents.shape[1:], generator=generator))
        noise = noise.to(latents.device)
        velocity = self.predict_velocity(add_noise(latents, noise, sigma), sigma, condition)
        return nn.functional.mse_loss(velocity.float(), velocity_target(latents, noise))

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        *,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Images of the size of the given ones, otherwise of SANA's own. Raises ValueError for guidance without a null prompt."""
        condition = self.encode_prompts(input_ids, attention_mask, pixel_values)
        is_guided = guidance_scale != 1.0
        if is_guided:
            condition = torch.cat([condition, self.null_condition(input_ids).expand_as(condition)])
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=inference_sigmas(self.config.num_inference_steps).tolist(), device=self.device)
        latents = torch.randn(self.latent_shape(len(input_ids), pixel_values), generator=generator).to(self.device)
        for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            rows = torch.cat([latents, latents]) if is_guided else latents
            velocity = self.predict_velocity(rows, sigma.to(rows).expand(len(rows)), condition)
            if is_guided:
                velocity, null_velocity = velocity.chunk(2)
                velocity = null_velocity + guidance_scale * (velocity - null_velocity)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return self.autoencoder.decode(latents / self.autoencoder.config.scaling_factor).sample

    def latent_shape(self, num_images: int, pixel_values: Tensor | None) -> tuple[int, ...]:
        """(B, C, h, w) for images of the size of the given ones, otherwise of SANA's own."""
        ratio, sample_size = self.autoencoder.spatial_compression_ratio, self.transformer.config.sample_size
        given = (sample_size, sample_size) if pixel_values is None else [s // ratio for s in pixel_values.shape[-2:]]
        return num_images, self.transformer.config.in_channels, *given

    def null_condition(self, like: Tensor) -> Tensor:
        """The condition (1, Q, C) of the null prompt. Raises ValueError if the model has none."""
        if not self.config.null_prompt_ids:
            raise ValueError("guidance_scale must be 1 for a model without null_prompt_ids.")
        null_ids = like.new_tensor([self.config.null_prompt_ids])
        return self.encode_prompts(null_ids, torch.ones_like(null_ids))


def per_row(generators: list[torch.Generator], sample: Callable[[torch.Generator], Tensor]) -> Tensor:
    """A sample of each generator, stacked."""
    return torch.stack([sample(generator) for generator in generators])
