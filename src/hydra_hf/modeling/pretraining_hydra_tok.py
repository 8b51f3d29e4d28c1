"""The tokenizer for training: all that its losses need, in one call. HYDRA, section 3.3; HYDRA-X, section 2."""

from torch import Tensor

from .bottleneck import sample_posterior
from .configuration_hydra import HydraTokConfig
from .decompressor import Decompressor
from .flow import add_noise, predict_clean, velocity_target
from .grid import Grid, patchify
from .modeling_hydra_tok import HydraTokModel, HydraTokPreTrainedModel
from .outputs import HydraTokForPreTrainingOutput


class HydraTokForPreTraining(HydraTokPreTrainedModel):
    """The tokenizer for training: one call, so that DDP and FSDP wrap all of it. Save its `.model` with `save_pretrained`.

    Args:
        video_teacher_size: width of a video teacher, for which the semantic states of clips are decompressed; None for none.
    """

    def __init__(self, config: HydraTokConfig, video_teacher_size: int | None = None):
        super().__init__(config)
        self.model = HydraTokModel(config)
        self.decompressor = None
        if video_teacher_size is not None:
            self.decompressor = Decompressor(config, video_teacher_size)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        latent_noise: Tensor,
        pixel_noise: Tensor | None = None,
        sigma: Tensor | None = None,
        distill_layers: tuple[int, ...] | None = None,
    ) -> HydraTokForPreTrainingOutput:
        """Reconstruction path (eq. 1-7), and as much of the understanding path as the distillation needs.

        Args:
            pixel_values: (B, 3, H, W), or clips (B, 3, 1 + 4n, H, W), in [-1, 1].
            latent_noise: (B, N, C), the noise that samples the latents from their posterior; zeros give the mean.
            pixel_noise, sigma: (B, N, 3 p p) and (B,), the noise of a flow decoder's patches and its level.
            distill_layers: blocks, counted from 1, whose outputs are compared with a teacher's (L_dist); () is the output of
                Sem-ViT, None nothing.
        """
        model, patch = self.model, self.config.patch_size
        grid = model.get_grid(pixel_values)
        normalized = model.normalize_pixels(pixel_values)
        layer_outputs: list[Tensor] = []
        gen_states = model.gen_vit(normalized, layer_outputs)  # (B, N, D)
        bottleneck = model.bottleneck(gen_states)  # mean, logvar: (B, N, C)
        semantic_states = None
        if self._reads_semantics(distill_layers):
            semantic_states = model.sem_vit(bottleneck.hidden_states, [grid], layer_outputs)  # (B, N, D)
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
            clean_pixel_values=model.denormalize_pixels(model.as_pixels(clean_patches, grid, pixel_values)),
            velocity=velocity,
            velocity_target=target,
            mean=bottleneck.mean,
            logvar=bottleneck.logvar,
            gen_states=gen_states,
            bottleneck_states=bottleneck.hidden_states,
            hidden_states=self._anchor_states(distill_layers, layer_outputs, semantic_states, grid),
            video_states=self._decompress(semantic_states, grid),
        )

    def _reads_semantics(self, distill_layers: tuple[int, ...] | None) -> bool:
        is_behind = (
            distill_layers is not None
            and max(distill_layers, default=self.config.num_hidden_layers) > self.config.num_gen_layers
        )
        return is_behind or self.decompressor is not None

    def _anchor_states(
        self,
        distill_layers: tuple[int, ...] | None,
        layer_outputs: list[Tensor],
        semantic_states: Tensor | None,
        grid: Grid,
    ) -> tuple[Tensor, ...]:
        """What an image teacher is compared with: the states of an image, or of a clip's first frame."""
        if distill_layers is None:
            return ()
        num_patches, num_cls = grid[1] * grid[2], int(self.config.use_cls_token)
        if not distill_layers:
            return (semantic_states[:, :num_patches],)
        lengths = [num_patches + num_cls * (layer <= self.config.num_gen_layers) for layer in distill_layers]
        return tuple(layer_outputs[layer - 1][:, :length] for layer, length in zip(distill_layers, lengths))

    def _decompress(self, semantic_states: Tensor | None, grid: Grid) -> Tensor | None:
        """What a video teacher is compared with. Of images, four frames of one token, which no loss should count: DDP expects
        every parameter to be used in every step."""
        if self.decompressor is None:
            return None
        if grid[0] == 1:
            return self.decompressor(semantic_states[:1, :1].repeat(1, 2, 1), (2, 1, 1))
        return self.decompressor(semantic_states, grid)


__all__ = ["HydraTokForPreTraining"]
