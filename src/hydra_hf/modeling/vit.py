"""The ViT of HYDRA-TOK, cut in two: Gen-ViT in front of the bottleneck, Sem-ViT behind it. HYDRA, section 3.1; HYDRA-X, section 2."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .configuration_hydra import HydraTokConfig
from .grid import NUM_POSITION_FEATURES, Grid, latents_to_tokens, position_features, tokens_to_latents
from .layers import ViTLayer, ZeroLinear
from .temporal import FrameCache, FrameLayout, TemporalFold, fold_factors, group_frames, run_layers


class Embeddings(nn.Module):
    """Patches, a class token and a learned position table that is interpolated to any grid."""

    def __init__(self, config: HydraTokConfig):
        super().__init__()
        self.grid_size = config.image_size // config.patch_size
        self.fold_factor = fold_factors(config.temporal_fold_layers).get(0, 1)
        self.position_interpolation = config.position_interpolation
        num_channels = self.fold_factor * config.num_channels  # of the frames that are one here, the anchor the last
        self.projection = nn.Conv2d(num_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
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

    def forward(self, pixel_values: Tensor, start: int = 0) -> Tensor:
        """Normalised pixels (B, 3, H, W) -> (B, cls + N, D).

        Of a clip (B, 3, T, H, W), of which earlier chunks had `start` frames, every folded frame has a class token.
        """
        frames = pixel_values[:, :, None] if pixel_values.ndim == 4 else pixel_values
        frames = group_frames(frames.transpose(1, 2), self.fold_factor, start)  # (B, T', factor, 3, H, W)
        images = frames.flatten(2, 3).flatten(0, 1)
        patches = self.projection(images.to(self.projection.weight.dtype))  # (B T', D, h, w)
        hidden_states = torch.cat([self.cls_token.expand(len(patches), -1, -1), latents_to_tokens(patches)], dim=1)
        hidden_states = hidden_states + self.interpolate_positions((1, *patches.shape[-2:]))
        return hidden_states.unflatten(0, frames.shape[:2]).flatten(1, 2)

    def get_layout(self, images: Sequence[Tensor], start: int = 0) -> FrameLayout:
        """Where the frames are in the embeddings of such images and clips, side by side."""
        patch = self.projection.kernel_size[0]
        sizes = [(1 if image.ndim == 4 else image.shape[2], *image.shape[-2:]) for image in images]
        grids = tuple((t, height // patch, width // patch) for t, height, width in sizes)
        return FrameLayout(grids, num_leading=self.cls_token.shape[1], start=start).folded(self.fold_factor)


class GenViT(nn.Module):
    """The first layers: pixels to the states that the bottleneck compresses."""

    def __init__(self, config: HydraTokConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.folds = nn.ModuleDict({
            str(layer): TemporalFold(config.hidden_size, factor)
            for layer, factor in fold_factors(config.temporal_fold_layers).items() if layer > 0
        })  # fmt: skip
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_gen_layers)])

    def forward(
        self, pixel_values: Tensor | Sequence[Tensor], layer_outputs: list[Tensor] | None = None,
        cache: FrameCache | None = None, **kwargs,
    ) -> Tensor:  # fmt: skip
        """Normalised pixels (B, 3, H, W) or (B, 3, T, H, W) -> (B, N, D); class tokens are dropped, or they would leak past
        the bottleneck.

        Several such tensors with the same B give rows of several images, only for flash attention. The outputs
        (B, cls + N, D) of all layers are appended to `layer_outputs`: FSDP replaces the class that hooks would record.
        `cache` holds the state of earlier chunks of a clip.
        """
        images = [pixel_values] if isinstance(pixel_values, Tensor) else pixel_values
        start = 0 if cache is None else cache.num_frames
        embeddings = [self.embeddings(image, start) for image in images]
        hidden_states = torch.cat(embeddings, dim=1) if len(images) > 1 else embeddings[0]
        layout = self.embeddings.get_layout(images, start)
        hidden_states, layout = run_layers(self, self.folds, hidden_states, layout, cache, layer_outputs, **kwargs)
        return layout.apply(lambda frames: frames[:, :, layout.num_leading :], hidden_states)


class SemViT(nn.Module):
    """The last layers: unprojected latents to semantic states."""

    def __init__(self, config: HydraTokConfig):
        super().__init__()
        self.config = config
        self.position_proj = None
        if config.use_sem_positions:
            self.position_proj = ZeroLinear(NUM_POSITION_FEATURES, config.hidden_size)
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_sem_layers)])
        self.post_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_post_layernorm else nn.Identity()
        )

    def forward(
        self, hidden_states: Tensor, grids: Sequence[Grid], layer_outputs: list[Tensor] | None = None, start: int = 0,
        **kwargs,
    ) -> Tensor:  # fmt: skip
        """Unprojected latents (B, N, D) -> (B, N, D), in rows of images with `grids`, see `grid.py`.

        `start` is the frame at which they begin: 1 for the target of an edit, whose `frames` are `SourceStates.interact`.
        """
        if self.position_proj is not None:
            hidden_states = hidden_states + self.position_proj(position_features(grids, hidden_states))
        layout = FrameLayout(tuple(grids), start=start)
        hidden_states, _ = run_layers(self, {}, hidden_states, layout, layer_outputs=layer_outputs, **kwargs)
        return self.post_layernorm(hidden_states)
