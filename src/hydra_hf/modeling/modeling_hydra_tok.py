"""HYDRA-TOK and HYDRA-XTok: one ViT as visual tokenizer. HYDRA, section 3, figure 2; HYDRA-X, section 2.

pixels -> Gen-ViT -> bottleneck (64 channels a token) -> Sem-ViT -> semantic states
                         `-> pixel decoder -> pixels
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder

from .bottleneck import Bottleneck
from .compat import capture_outputs
from .configuration_hydra import HydraTokConfig, PixelFlowDecoderConfig, PixelViTDecoderConfig
from .grid import (
    Grid,
    clip_grid,
    image_grid,
    latents_to_tokens,
    num_tokens,
    patchify,
    tokens_to_latents,
    unpatchify,
)
from .layers import ViTAttention, ViTLayer, init_layer
from .outputs import (
    HydraTokDecoderOutput,
    HydraTokEncoderOutput,
    HydraTokOutput,
)
from .pixel_decoders import PIXEL_DECODERS
from .pretrained import HydraPreTrainedMixin
from .temporal import FrameCache, FrameLinear, split_clip
from .vit import Embeddings, GenViT, SemViT


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
        elif isinstance(module, FrameLinear):
            module.init_identity()

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
        """Understanding path for `pixel_values` (B, 3, H, W), or clips (B, 3, 1 + 4n, H, W), in [-1, 1].

        Raises ValueError for another rank, type, range or number of frames, or sides that are not multiples of the patch size.
        """
        grid = self.get_grid(pixel_values)
        self.check_range(pixel_values)
        hidden_states = self.gen_vit(self.normalize_pixels(pixel_values), **kwargs)  # (B, N, D)
        bottleneck = self.bottleneck(hidden_states)  # mean, logvar: (B, N, C)
        semantic_states = self.sem_vit(bottleneck.hidden_states, [grid], **kwargs)  # (B, N, D)
        return HydraTokOutput(
            last_hidden_state=semantic_states,
            latents=_as_clip(tokens_to_latents(self.bottleneck.normalize(bottleneck.mean), grid), pixel_values),
            mean=bottleneck.mean,
            logvar=bottleneck.logvar,
        )

    @apply_forward_hook
    def encode(
        self, pixel_values: Tensor, return_dict: bool = True, *, chunk_frames: int | None = None
    ) -> HydraTokEncoderOutput | tuple:
        """Normalised latents (B, C, h, w) of `pixel_values` (B, 3, H, W) in [-1, 1], as a Gaussian (eq. 2-3).

        For clips (B, 3, 1 + 4n, H, W) they are (B, C, 1 + n, h, w).

        Args:
            chunk_frames: encodes a clip in chunks of at most this many frames, a multiple of 4: the same latents, in the
                memory of one chunk.

        Raises ValueError for another rank, type, range or number of frames, or sides that are not multiples of the patch size.
        """
        if chunk_frames is None:
            output = _posterior(self._encode(pixel_values))
        else:
            self.get_grid(pixel_values)  # its error is about the whole clip
            chunks = split_clip(pixel_values, chunk_frames, self.config.temporal_compression_ratio)
            posteriors = [chunk.latent_dist for chunk in self.encode_chunks(chunks)]
            output = _posterior(torch.cat([posterior.parameters for posterior in posteriors], dim=2))
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[HydraTokEncoderOutput]:
        """`encode` of one long clip that comes in chunks: (B, 3, 1 + 4n, H, W), then (B, 3, 4n, H, W) any number of times.

        Raises ValueError in training, and for full attention, which reads all frames at once.
        """
        cache = self._empty_cache(self.config)
        return (_posterior(self._encode(chunk, cache)) for chunk in chunks)

    def _encode(self, pixel_values: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Mean and log variance of normalised latents, (B, 2 C, [T',] h, w)."""
        grid = self.get_grid(pixel_values, cache)
        self.check_range(pixel_values)
        bottleneck = self.bottleneck(self.gen_vit(self.normalize_pixels(pixel_values), cache=cache))
        if cache is not None:
            cache.num_frames += pixel_values.shape[2]
        mean = self.bottleneck.normalize(bottleneck.mean)
        logvar = bottleneck.logvar - 2 * self.bottleneck.latents_std.log()
        return _as_clip(tokens_to_latents(torch.cat([mean, logvar], dim=-1), grid), pixel_values)

    @apply_forward_hook
    def get_semantic_states(self, latents: Tensor) -> Tensor:
        """Semantic states (B, N, D) of normalised latents (B, C, h, w) or (B, C, T', h, w), clean or noised."""
        grid = self._latent_grid(latents)
        return self.sem_vit(self.get_bottleneck_states(latents_to_tokens(latents)), [grid])

    def get_bottleneck_states(self, tokens: Tensor) -> Tensor:
        """The input (B, N, D) of Sem-ViT for normalised latents as tokens (B, N, C): denormalised and unprojected."""
        return self.bottleneck.semantic_up_proj(self._denormalize(tokens))

    def encode_rows(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The mode of normalised latents as tokens (B, N, C), for pixels in [-1, 1] as patches (B, N, 3 p p), see `grid.py`.

        The grids are those of the pixels: t frames of a clip, which are 1 + (t - 1) / 4 latent frames.
        """
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
        chunk_frames: int | None = None,
    ) -> HydraTokDecoderOutput | tuple:
        """Pixels (B, 3, H, W), near [-1, 1], of normalised latents (B, C, h, w); of (B, C, 1 + n, h, w), (B, 3, 1 + 4n, H, W).

        Args:
            num_inference_steps: Euler steps of a flow decoder; None is the number in its config.
            generator: draws the starting noise of a flow decoder; None is torch's global generator, as in diffusers.
            noise: the starting noise itself, (B, 3, H, W).
            chunk_frames: decodes a clip in chunks of at most this many frames, a multiple of 4: the same pixels.

        Raises:
            ValueError: without a decoder, for latents of another rank or number of channels, or noise of another shape.
        """
        self._check_decoder()
        grid = self._latent_grid(latents)
        if chunk_frames is not None:
            ratio = self.config.temporal_compression_ratio
            chunks = split_clip(latents, chunk_frames, ratio, frames_per_step=ratio)
            sample = torch.cat(list(self.decode_chunks(chunks)), dim=2)
            return HydraTokDecoderOutput(sample=sample) if return_dict else (sample,)
        rows = [latents_to_tokens(latents)]
        if self.decodes_from_noise:
            rows.append(self.get_decoder_noise([grid] * len(latents), latents.device, generator, noise))
        patches = self.decode_rows(*rows, grids=[grid], num_inference_steps=num_inference_steps)
        sample = self.as_pixels(patches, grid, latents).to(latents.dtype)
        return HydraTokDecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """`decode` of one long clip whose latents come in chunks (B, C, T', h, w). Raises ValueError as `encode_chunks`."""
        self._check_decoder()
        cache = self._empty_cache(self.config.decoder_config)
        return (self._decode(chunk, cache) for chunk in chunks)

    def _decode(self, latents: Tensor, cache: FrameCache) -> Tensor:
        grid = self._latent_grid(latents)
        states = self._unproject_for_decoder(latents_to_tokens(latents))
        patches = self._denormalize_patches(self.pixel_decoder(states, [grid], cache=cache))
        cache.num_frames += grid[0]
        return self.as_pixels(patches, grid, latents).to(latents.dtype)

    def as_pixels(self, patches: Tensor, grid: Grid, like: Tensor) -> Tensor:
        """Images of patches (B, N, 3 p p), or clips where `like` is one; `grid` is that of their latents."""
        height, width = grid[1:]
        pixels = unpatchify(patches, self.config.patch_size, (patches.shape[1] // (height * width), height, width))
        return _as_clip(pixels, like)

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
        """Pixels as patches (B, N, 3 p p) of normalised latents as tokens (B, N, C), see `grid.py`; `noise` is patches, too.

        The grids are those of the latents; a clip has the patches of all its frames.
        """
        states = self._unproject_for_decoder(tokens)
        patches = self.pixel_decoder.decode(states, grids, noise=noise, num_inference_steps=num_inference_steps)
        return self._denormalize_patches(patches)

    def _unproject_for_decoder(self, tokens: Tensor) -> Tensor:
        return self.bottleneck.decoder_up_proj(self._denormalize(tokens))

    def _denormalize_patches(self, patches: Tensor) -> Tensor:
        """(B, N, 3 p p), each patch a small image."""
        patch = self.config.patch_size
        images = patches.flatten(0, 1).unflatten(-1, (-1, patch, patch))
        return self.denormalize_pixels(images).flatten(1).unflatten(0, patches.shape[:2])

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
        """Images or clips (B, 3, ...) in [-1, 1] with the statistics that the ViT was trained with."""
        mean, std = self._pixel_statistics(pixel_values)
        return ((pixel_values + 1) / 2 - mean) / std

    def denormalize_pixels(self, pixel_values: Tensor) -> Tensor:
        """The inverse of `normalize_pixels`."""
        mean, std = self._pixel_statistics(pixel_values)
        return (pixel_values * std + mean) * 2 - 1

    def get_grid(self, pixel_values: Tensor, cache: FrameCache | None = None) -> Grid:
        """The latent grid of each image, clip, or next chunk after `cache`. Raises ValueError for any other tensor."""
        config, shape = self.config, tuple(pixel_values.shape)
        ranks = {4: f"(B, {config.num_channels}, H, W)", 5: f"(B, {config.num_channels}, T, H, W)"}
        if not self.reads_clips:
            del ranks[5]
        elif cache is not None:
            del ranks[4]
        if len(shape) not in ranks or shape[1] != config.num_channels or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values {shape} of {pixel_values.dtype} must be floats {' or '.join(ranks.values())}"
                f"{'' if self.reads_clips else ': without temporal_fold_layers the model reads images alone'}."
            )
        if not len(pixel_values):
            raise ValueError(f"pixel_values {shape} hold no image, expected at least one.")
        if len(shape) == 4:
            return image_grid(*shape[-2:], config.patch_size)
        start = 0 if cache is None else cache.num_frames
        return clip_grid(*shape[-3:], config.patch_size, config.temporal_compression_ratio, start)

    @property
    def reads_clips(self) -> bool:
        """Whether clips are accepted, too."""
        return bool(self.config.temporal_fold_layers)

    def check_range(self, pixel_values: Tensor) -> None:
        """Raises ValueError for pixels clearly outside [-1, 1], except in a compiled graph, which cannot branch on data."""
        if not torch.compiler.is_compiling() and pixel_values.detach().abs().amax() > 1.5:
            raise ValueError(
                f"pixel_values range from {pixel_values.min().item():.3g} to {pixel_values.max().item():.3g};"
                " expected pixels in [-1, 1]."
            )

    def _pixel_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = like.new_tensor(self.config.image_mean), like.new_tensor(self.config.image_std)
        shape = (-1, *[1] * (like.ndim - 2))
        return mean.view(shape), std.view(shape)

    def _latent_grid(self, latents: Tensor) -> Grid:
        """The grid of each image or clip. Raises ValueError for anything but latents."""
        channels, shape = self.config.latent_channels, tuple(latents.shape)
        if len(shape) not in ((4, 5) if self.reads_clips else (4,)) or shape[1] != channels:
            clips = f" or (B, {channels}, T, h, w)" if self.reads_clips else ""
            raise ValueError(f"latents {shape} must be (B, {channels}, h, w){clips}.")
        return shape[2:] if len(shape) == 5 else (1, *shape[2:])

    def _check_decoder(self) -> None:
        if self.pixel_decoder is None:
            raise ValueError("This HydraTokModel has no pixel decoder (decoder_config is None), so it cannot decode.")

    def _empty_cache(self, config: HydraTokConfig | PixelViTDecoderConfig) -> FrameCache:
        """For the first chunk of a clip. Raises ValueError if chunks would differ from the whole clip."""
        if not self.reads_clips or self.training or config.temporal_attention == "full":
            raise ValueError(
                "Chunks need a model for clips, in evaluation, whose frames see no later ones; got"
                f" temporal_fold_layers={self.config.temporal_fold_layers}, training={self.training},"
                f" temporal_attention={config.temporal_attention!r}."
            )
        return FrameCache()

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


def _posterior(parameters: Tensor) -> HydraTokEncoderOutput:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return HydraTokEncoderOutput(latent_dist=DiagonalGaussianDistribution(parameters))


def _as_clip(tensor: Tensor, like: Tensor) -> Tensor:
    """A clip of one frame has the frame's axis too."""
    return tensor[:, :, None] if like.ndim == 5 and tensor.ndim == 4 else tensor


__all__ = ["HydraTokModel", "HydraTokPreTrainedModel"]
