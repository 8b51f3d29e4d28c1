"""HYDRA-TOK: one ViT as visual tokenizer. HYDRA, section 3; figure 2.

pixels -> Gen-ViT -> bottleneck (64 channels a token) -> Sem-ViT -> semantic states
                         `-> pixel decoder -> pixels
"""

from collections.abc import Sequence

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder

from .bottleneck import Bottleneck, sample_posterior
from .compat import capture_outputs
from .configuration_hydra import HydraTokConfig, PixelFlowDecoderConfig
from .flow import add_noise, predict_clean, velocity_target
from .grid import (
    NUM_POSITION_FEATURES,
    Grid,
    image_grid,
    latents_to_tokens,
    num_tokens,
    patchify,
    position_features,
    tokens_to_latents,
    unpatchify,
    varlen_arguments,
)
from .layers import ViTAttention, ViTLayer, ZeroLinear, init_layer
from .outputs import (
    HydraTokDecoderOutput,
    HydraTokEncoderOutput,
    HydraTokForPreTrainingOutput,
    HydraTokOutput,
)
from .pixel_decoders import PIXEL_DECODERS
from .pretrained import HydraPreTrainedMixin


class Embeddings(nn.Module):
    """Patches, a class token and a learned position table that is interpolated to any grid."""

    def __init__(self, config: HydraTokConfig):
        super().__init__()
        self.grid_size = config.image_size // config.patch_size
        self.position_interpolation = config.position_interpolation
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        num_cls = int(config.use_cls_token)
        self.cls_token = nn.Parameter(torch.zeros(1, num_cls, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_cls + self.grid_size**2, config.hidden_size))

    def interpolate_positions(self, grid: Grid) -> Tensor:
        """The table (1, cls + N, D) for a grid of one frame, computed in fp32 as in the original code."""
        own_grid = (1, self.grid_size, self.grid_size)
        if grid == own_grid:
            return self.position_embeddings
        num_cls = self.cls_token.shape[1]
        table = tokens_to_latents(self.position_embeddings[:, num_cls:].float(), own_grid)
        antialias = self.position_interpolation == "bilinear"
        table = nn.functional.interpolate(
            table, size=grid[1:], mode=self.position_interpolation, align_corners=False, antialias=antialias
        )
        table = latents_to_tokens(table).to(self.position_embeddings.dtype)
        return torch.cat([self.position_embeddings[:, :num_cls], table], dim=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W) -> (B, cls + N, D)."""
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))  # (B, D, h, w)
        hidden_states = torch.cat([self.cls_token.expand(len(patches), -1, -1), latents_to_tokens(patches)], dim=1)
        return hidden_states + self.interpolate_positions((1, *patches.shape[-2:]))


class GenViT(nn.Module):
    """The first layers: pixels to the states that the bottleneck compresses."""

    def __init__(self, config: HydraTokConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_gen_layers)])

    def forward(
        self, pixel_values: Tensor | Sequence[Tensor], layer_outputs: list[Tensor] | None = None, **kwargs
    ) -> Tensor:
        """Normalised pixels (B, 3, H, W) -> (B, N, D); the class token is dropped, or it would leak past the bottleneck.

        Several such tensors with the same B give rows of several images, only for flash attention. The outputs
        (B, cls + N, D) of all layers are appended to `layer_outputs`: FSDP replaces the class that hooks would record.
        """
        images = [pixel_values] if isinstance(pixel_values, Tensor) else pixel_values
        embeddings = [self.embeddings(image) for image in images]
        lengths = [embedding.shape[1] for embedding in embeddings]
        hidden_states = torch.cat(embeddings, dim=1) if len(images) > 1 else embeddings[0]
        kwargs |= varlen_arguments(lengths, hidden_states.device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
            if layer_outputs is not None:
                layer_outputs.append(hidden_states)
        num_cls = self.embeddings.cls_token.shape[1]
        if len(images) == 1:
            return hidden_states[:, num_cls:]
        return torch.cat([states[:, num_cls:] for states in hidden_states.split(lengths, dim=1)], dim=1)


class SemViT(nn.Module):
    """The last layers: unprojected latents to semantic states."""

    def __init__(self, config: HydraTokConfig):
        super().__init__()
        self.position_proj = None
        if config.use_sem_positions:
            self.position_proj = ZeroLinear(NUM_POSITION_FEATURES, config.hidden_size)
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_sem_layers)])
        self.post_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_post_layernorm else nn.Identity()
        )

    def forward(
        self, hidden_states: Tensor, grids: Sequence[Grid], layer_outputs: list[Tensor] | None = None, **kwargs
    ) -> Tensor:
        """Unprojected latents (B, N, D) -> (B, N, D), in rows of images with `grids`, see `grid.py`."""
        if self.position_proj is not None:
            hidden_states = hidden_states + self.position_proj(position_features(grids, hidden_states))
        kwargs |= varlen_arguments([num_tokens(grid) for grid in grids], hidden_states.device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
            if layer_outputs is not None:
                layer_outputs.append(hidden_states)
        return self.post_layernorm(hidden_states)


class HydraTokPreTrainedModel(HydraPreTrainedMixin, PreTrainedModel):
    config: HydraTokConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTLayer", "FlowMLPBlock", "Embeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": [
            OutputRecorder(ViTLayer, layer_name="gen_vit"),
            OutputRecorder(ViTLayer, layer_name="sem_vit"),
        ],
        "attentions": [
            OutputRecorder(ViTAttention, index=1, layer_name="gen_vit"),
            OutputRecorder(ViTAttention, index=1, layer_name="sem_vit"),
        ],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_layer(module, self.config.initializer_range)
        if isinstance(module, Embeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, Bottleneck):
            module.init_statistics()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers; of a HYDRA checkpoint, the vision tower is loaded. Raises ValueError for weights that do not fit."""
        kwargs.setdefault("key_mapping", {r"^model\.vision_tower\.": ""})
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)


class HydraTokModel(HydraTokPreTrainedModel):
    """The tokenizer. `encode`, `decode`, `scaling_factor` make it an autoencoder for diffusers."""

    def __init__(self, config: HydraTokConfig):
        super().__init__(config)
        if config.decoder_config is not None and config.decoder_config._attn_implementation is None:
            config.decoder_config._attn_implementation = config._attn_implementation
        self.gen_vit = GenViT(config)
        self.bottleneck = Bottleneck(config)
        self.sem_vit = SemViT(config)
        self.pixel_decoder = None
        if config.decoder_config is not None:
            self.pixel_decoder = PIXEL_DECODERS[type(config.decoder_config)](config.decoder_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.gen_vit.embeddings.projection

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.gen_vit.embeddings.projection = value

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> HydraTokOutput:
        """Understanding path for `pixel_values` (B, 3, H, W) in [-1, 1].

        Raises ValueError for another rank, type or range, or sides that are not multiples of the patch size.
        """
        grid = self.get_grid(pixel_values)
        self.check_range(pixel_values)
        hidden_states = self.gen_vit(self.normalize_pixels(pixel_values), **kwargs)  # (B, N, D)
        bottleneck = self.bottleneck(hidden_states)  # mean, logvar: (B, N, C)
        semantic_states = self.sem_vit(bottleneck.hidden_states, [grid], **kwargs)  # (B, N, D)
        return HydraTokOutput(
            last_hidden_state=semantic_states,
            latents=tokens_to_latents(self.bottleneck.normalize(bottleneck.mean), grid),
            mean=bottleneck.mean,
            logvar=bottleneck.logvar,
        )

    @apply_forward_hook
    def encode(self, pixel_values: Tensor, return_dict: bool = True) -> HydraTokEncoderOutput | tuple:
        """Normalised latents (B, C, h, w) of `pixel_values` (B, 3, H, W) in [-1, 1], as a Gaussian (eq. 2-3).

        Raises ValueError for another rank, type or range, or sides that are not multiples of the patch size.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        grid = self.get_grid(pixel_values)
        self.check_range(pixel_values)
        bottleneck = self.bottleneck(self.gen_vit(self.normalize_pixels(pixel_values)))
        mean = self.bottleneck.normalize(bottleneck.mean)
        logvar = bottleneck.logvar - 2 * self.bottleneck.latents_std.log()
        latent_dist = DiagonalGaussianDistribution(tokens_to_latents(torch.cat([mean, logvar], dim=-1), grid))
        return HydraTokEncoderOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    @apply_forward_hook
    def get_semantic_states(self, latents: Tensor) -> Tensor:
        """Semantic states (B, N, D) of normalised latents (B, C, h, w), clean or noised."""
        self._check_latents(latents)
        return self.sem_vit(self.get_bottleneck_states(latents_to_tokens(latents)), [(1, *latents.shape[-2:])])

    def get_bottleneck_states(self, tokens: Tensor) -> Tensor:
        """The input (B, N, D) of Sem-ViT for normalised latents as tokens (B, N, C): denormalised and unprojected."""
        return self.bottleneck.semantic_up_proj(self._denormalize(tokens))

    def encode_rows(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The mode of normalised latents as tokens (B, N, C), for pixels in [-1, 1] as patches (B, N, 3 p p), see `grid.py`."""
        return self.bottleneck.normalize(self.encode_means(patches, grids))

    def encode_means(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """As `encode_rows`, but the mean of the posterior, before latents are normalised."""
        parts = zip(patches.split([num_tokens(grid) for grid in grids], dim=1), grids)
        images = [self.normalize_pixels(unpatchify(part, self.config.patch_size, grid)) for part, grid in parts]
        return self.bottleneck(self.gen_vit(images)).mean

    @apply_forward_hook
    def decode(
        self,
        latents: Tensor,
        return_dict: bool = True,
        *,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> HydraTokDecoderOutput | tuple:
        """Pixels (B, 3, H, W), near [-1, 1], of normalised latents (B, C, h, w).

        Args:
            num_inference_steps: Euler steps of a flow decoder; None is the number in its config.
            generator: draws the starting noise of a flow decoder; None is torch's global generator, as in diffusers.
            noise: the starting noise itself, (B, 3, H, W).

        Raises:
            ValueError: without a decoder, for latents of another rank or number of channels, or noise of another shape.
        """
        if self.pixel_decoder is None:
            raise ValueError("This HydraTokModel has no pixel decoder (decoder_config is None), so it cannot decode.")
        self._check_latents(latents)
        grid = (1, *latents.shape[-2:])
        rows = [latents_to_tokens(latents)]
        if self.decodes_from_noise:
            rows.append(self.get_decoder_noise([grid] * len(latents), latents.device, generator, noise))
        patches = self.decode_rows(*rows, grids=[grid], num_inference_steps=num_inference_steps)
        sample = unpatchify(patches, self.config.patch_size, grid).to(latents.dtype)
        return HydraTokDecoderOutput(sample=sample) if return_dict else (sample,)

    @property
    def decodes_from_noise(self) -> bool:
        """Whether the decoder is a flow decoder, which starts from noise."""
        return isinstance(self.config.decoder_config, PixelFlowDecoderConfig)

    def decode_rows(
        self,
        tokens: Tensor,
        noise: Tensor | None = None,
        *,
        grids: Sequence[Grid],
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Pixels as patches (B, N, 3 p p) of normalised latents as tokens (B, N, C), see `grid.py`; `noise` is patches, too."""
        patches = self.pixel_decoder.decode(
            self.bottleneck.decoder_up_proj(self._denormalize(tokens)), grids,
            noise=noise, num_inference_steps=num_inference_steps,
        )  # fmt: skip
        patch = self.config.patch_size
        return self.denormalize_pixels(patches.unflatten(-1, (-1, patch, patch))).flatten(-3)

    def set_latents_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets the per-channel statistics (C,) of sampled latents that `encode` and `decode` normalise with.

        Raises ValueError for another shape or a standard deviation that is not positive and finite.
        """
        expected = self.bottleneck.latents_mean.shape
        if mean.shape != expected or std.shape != expected:
            raise ValueError(f"mean {tuple(mean.shape)} and std {tuple(std.shape)} must both be {tuple(expected)}.")
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"std must be positive and both finite; the smallest std is {std.min().item():.3g}.")
        self.bottleneck.latents_mean.copy_(mean)
        self.bottleneck.latents_std.copy_(std)

    def normalize_pixels(self, pixel_values: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] with the statistics that the ViT was trained with."""
        mean, std = self._pixel_statistics(pixel_values)
        return ((pixel_values + 1) / 2 - mean) / std

    def denormalize_pixels(self, pixel_values: Tensor) -> Tensor:
        """The inverse of `normalize_pixels`."""
        mean, std = self._pixel_statistics(pixel_values)
        return (pixel_values * std + mean) * 2 - 1

    def get_grid(self, pixel_values: Tensor) -> Grid:
        """The grid of each image.

        Raises ValueError for anything but a batch of images whose sides are multiples of the patch size.
        """
        channels, patch = self.config.num_channels, self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} of {pixel_values.dtype} must be floats (B, {channels}, H, W)."
            )
        if not len(pixel_values):
            raise ValueError(f"pixel_values {tuple(pixel_values.shape)} hold no image, expected at least one.")
        return image_grid(*pixel_values.shape[-2:], patch)

    def check_range(self, pixel_values: Tensor) -> None:
        """Raises ValueError for pixels clearly outside [-1, 1], except in a compiled graph, which cannot branch on data."""
        if not torch.compiler.is_compiling() and pixel_values.detach().abs().amax() > 1.5:
            raise ValueError(
                f"pixel_values range from {pixel_values.min().item():.3g} to {pixel_values.max().item():.3g};"
                " expected pixels in [-1, 1]."
            )

    def _pixel_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = like.new_tensor(self.config.image_mean), like.new_tensor(self.config.image_std)
        return mean[:, None, None], std[:, None, None]

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"latents {tuple(latents.shape)} must be (B, {self.config.latent_channels}, h, w).")

    def _denormalize(self, tokens: Tensor) -> Tensor:
        """Denormalised tokens, in the dtype of the weights that read them rather than that of the statistics."""
        return self.bottleneck.denormalize(tokens).to(self.bottleneck.semantic_up_proj.weight.dtype)

    def get_decoder_noise(
        self, grids: Sequence[Grid], device: torch.device, generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The initial noise of a flow decoder, as patches (B, N, 3 p p) for images of one grid: drawn, or from `noise` (B, 3,
        H, W)."""
        from diffusers.utils.torch_utils import randn_tensor

        patch = self.config.patch_size
        shape = (len(grids), self.config.num_channels, grids[0][1] * patch, grids[0][2] * patch)
        if noise is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise {tuple(noise.shape)} must be {shape}.")
        return patchify(noise, patch)


class HydraTokForPreTraining(HydraTokPreTrainedModel):
    """The tokenizer for training: one call, so that DDP and FSDP wrap all of it. Save its `.model` with `save_pretrained`."""

    def __init__(self, config: HydraTokConfig):
        super().__init__(config)
        self.model = HydraTokModel(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        latent_noise: Tensor,
        pixel_noise: Tensor | None = None,
        sigma: Tensor | None = None,
        distill_layers: tuple[int, ...] = (),
    ) -> HydraTokForPreTrainingOutput:
        """Reconstruction path (eq. 1-7), and as much of the understanding path as `distill_layers` need.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            latent_noise: (B, N, C), the noise that samples the latents from their posterior; zeros give the mean.
            pixel_noise, sigma: (B, N, 3 p p) and (B,), the noise of a flow decoder's patches and its level.
            distill_layers: blocks, counted from 1, whose outputs are compared with a teacher's (L_dist).
        """
        model, patch = self.model, self.config.patch_size
        grid = model.get_grid(pixel_values)
        normalized = model.normalize_pixels(pixel_values)
        layer_outputs: list[Tensor] = []
        gen_states = model.gen_vit(normalized, layer_outputs)  # (B, N, D)
        bottleneck = model.bottleneck(gen_states)  # mean, logvar: (B, N, C)
        if max(distill_layers, default=0) > self.config.num_gen_layers:
            model.sem_vit(bottleneck.hidden_states, [grid], layer_outputs)  # (B, N, D), only its layers are used
        latents = sample_posterior(bottleneck.mean, bottleneck.logvar, latent_noise)  # (B, N, C)
        decoder_states = model.bottleneck.decoder_up_proj(latents.to(gen_states.dtype))  # (B, N, D)
        velocity = target = None
        if model.decodes_from_noise:
            patches = patchify(normalized, patch)  # (B, N, 3 p p)
            noisy_patches = add_noise(patches, pixel_noise, sigma)
            conditions = model.pixel_decoder.get_conditions(decoder_states, [grid])
            velocity, target = (
                model.pixel_decoder(noisy_patches, sigma, conditions),
                velocity_target(patches, pixel_noise),
            )
            clean_patches = predict_clean(noisy_patches, velocity, sigma)
        else:
            clean_patches = model.pixel_decoder(decoder_states, [grid])
        return HydraTokForPreTrainingOutput(
            clean_pixel_values=model.denormalize_pixels(unpatchify(clean_patches, patch, grid)),
            velocity=velocity,
            velocity_target=target,
            mean=bottleneck.mean,
            logvar=bottleneck.logvar,
            gen_states=gen_states,
            bottleneck_states=bottleneck.hidden_states,
            hidden_states=tuple(layer_outputs[layer - 1] for layer in distill_layers),
        )


__all__ = ["HydraTokForPreTraining", "HydraTokModel", "HydraTokPreTrainedModel"]
