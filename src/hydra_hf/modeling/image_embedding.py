"""From images and clips to the LLM's inputs. HYDRA, section 2.2; HYDRA-X, section 3.

pixels -> latents -> Sem-ViT, a target of an edit together with its sources -> projector -> after its time token
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .grid import (
    Grid,
    check_packed,
    image_grids,
    image_starts,
    is_one_grid,
    latent_grids,
    latents_to_tokens,
    pack_dense,
    pack_latents,
    prepend,
    run_by_grid,
    split_images,
)
from .layers import scale_gradient
from .source_interaction import SourceStates, group_targets


class ImageEmbeddingMixin:
    """What `HydraModel` does with images and clips; needs `vision_tower`, `multi_modal_projector`, `time_embedding` and a
    `HydraConfig`."""

    def get_latents(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Tensor:
        """Clean latents, the normalised mean of the posterior: (num_images, C, [T',] h, w) for pixels (num_images, 3, [T,] H, W)
        in [-1, 1], (total_tokens, C) for packed ones, see `HydraModel.forward`."""
        if image_grid_thw is None:
            return self.vision_tower.encode(pixel_values).latent_dist.mode()
        grids = image_grids(image_grid_thw)
        check_packed("pixel_values", pixel_values, grids)
        self.get_latent_grids(grids)  # its error is clearer than those of the layers
        self.vision_tower.check_range(pixel_values)
        return run_by_grid(self.vision_tower.encode_rows, grids, [pixel_values], config=self.vision_tower.config)

    def get_latent_grids(self, grids: Sequence[Grid]) -> list[Grid]:
        """The grids of the latents of images and clips, whose own grids count frames. Raises ValueError for clips that the
        tokenizer cannot read."""
        return latent_grids(grids, self.vision_tower.config.temporal_compression_ratio)

    # Sem-ViT and projector

    def get_image_embeds(
        self, tokens: Tensor, sigma: Tensor, grids: Sequence[Grid], num_sources: Sequence[int] | None = None,
        sources: SourceStates | None = None,
    ) -> Tensor:  # fmt: skip
        """The LLM's input for packed latents (total_tokens, C) at noise levels `sigma` (num_images,): packed, D_llm wide,
        with each image's time token in front of it.

        Args:
            num_sources: how many images directly before it each image is made from, see `HydraModel.forward`.
            sources: instead, the states of sources that are not among the images, one row for each image, all of one grid.
        """
        config = self.vision_tower.config
        if sources is not None:
            if not is_one_grid(grids):
                raise ValueError(f"Edits in one call must have one size, got the grids {list(grids)}.")
            embed = partial(self._embed_rows, sources=sources)
            return run_by_grid(embed, grids, [tokens], [sigma], config=config)
        if num_sources is None or not any(num_sources) or not self.interacts:
            return run_by_grid(self._embed_rows, grids, [tokens], [sigma], config=config)
        states = self._interacting_states(tokens, grids, num_sources)
        return run_by_grid(self._project_rows, grids, [states], [sigma], config=config)

    @property
    def interacts(self) -> bool:
        """Whether the target of an edit sees its sources in Sem-ViT."""
        return self.config.use_source_interaction and self.config.llm_visual_input == "semantic"

    def _embed_rows(
        self, tokens: Tensor, sigma: Tensor, *, grids: Sequence[Grid], sources: SourceStates | None = None
    ) -> Tensor:
        return self._project_rows(self._visual_rows(tokens, grids=grids, sources=sources), sigma, grids=grids)

    def _visual_rows(self, tokens: Tensor, *, grids: Sequence[Grid], sources: SourceStates | None = None) -> Tensor:
        visual_states = self.vision_tower.get_bottleneck_states(tokens)  # (B, N, D)
        if self.config.llm_visual_input == "semantic":
            frames = {} if sources is None else {"frames": sources.interact, "start": 1}
            visual_states = self.vision_tower.sem_vit(visual_states, grids, **frames)  # (B, N, D)
        return visual_states

    def _project_rows(self, visual_states: Tensor, sigma: Tensor, *, grids: Sequence[Grid]) -> Tensor:
        image_embeds = self.multi_modal_projector(visual_states)  # (B, N, D_llm)
        if self.time_embedding is None:
            return image_embeds
        return prepend(image_embeds, self.time_embedding(sigma), grids)

    def _source_rows(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, SourceStates]:
        """Sem-ViT's states (B, N, D) of sources, and what targets see of them."""
        sources = SourceStates()
        states = self.vision_tower.get_bottleneck_states(tokens)
        return self.vision_tower.sem_vit(states, [grid], frames=sources.record), sources

    def _interacting_states(self, tokens: Tensor, grids: Sequence[Grid], num_sources: Sequence[int]) -> Tensor:
        """Sem-ViT's states, packed, of images some of which are made from others."""
        parts = split_images(tokens, grids)
        states: dict[int, Tensor] = {}
        for targets in group_targets(grids, num_sources):
            recorded = []
            for offset in range(num_sources[targets[0]], 0, -1):
                members = [target - offset for target in targets]
                rows, sources = self._source_rows(torch.stack([parts[m] for m in members]), grids[members[0]])
                states |= zip(members, rows)
                recorded.append(sources)
            rows = torch.stack([parts[target] for target in targets])
            states |= zip(
                targets, self._visual_rows(rows, grids=[grids[targets[0]]], sources=SourceStates.joined(recorded))
            )
        if others := [index for index in range(len(grids)) if index not in states]:
            packed, own_grids = torch.cat([parts[index] for index in others]), [grids[index] for index in others]
            rows = run_by_grid(self._visual_rows, own_grids, [packed], config=self.vision_tower.config)
            states |= zip(others, split_images(rows, own_grids))
        return torch.cat([states[index] for index in range(len(grids))])

    def encode_source(self, tokens: Tensor, grid: Grid) -> SourceStates:
        """What the target of an edit sees of its source, whose clean latents are (N, C)."""
        return self._source_rows(tokens[None], grid)[1]

    def encode_sources(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None, num_rows: int
    ) -> tuple[SourceStates, BaseModelOutputWithPooling]:
        """What targets see of their sources, one row of them for each of `num_rows` prompts; and `get_image_features` of all
        sources. Each goes through Sem-ViT once.

        Raises ValueError unless all prompts have as many sources, of the same sizes.
        """
        if image_grid_thw is None:
            pixel_values, image_grid_thw = pack_dense(pixel_values, self.vision_tower.config.patch_size)
        grids = image_grids(image_grid_thw)
        tokens = self.get_latents(pixel_values, image_grid_thw)
        count, rest = divmod(len(grids), num_rows)
        if rest or any(grid != grids[index % count] for index, grid in enumerate(grids)) or max(grids)[0] > 1:
            raise ValueError(
                f"Got the grids {grids} for the images of {num_rows} prompts, expected as many images for each of them, of the"
                " same sizes, and no clips."
            )
        parts, states, recorded = split_images(tokens, grids), {}, []
        for slot in range(count):
            members = range(slot, len(grids), count)
            rows, sources = self._source_rows(torch.stack([parts[index] for index in members]), grids[slot])
            states |= zip(members, rows)
            recorded.append(sources)
        packed = torch.cat([states[index] for index in range(len(grids))])
        return SourceStates.joined(recorded), self._features_of(packed, grids)

    # Given images

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """The vision tower's output for given images; `pooler_output` are their embeddings, time token included.

        For dense pixels: states (num_images, N, D), embeddings (num_images, [1 +] N, D_llm); `kwargs` go to the tower, such as
        `output_hidden_states`. For packed pixels: the input of the projector (total_tokens, D), and a tuple of embeddings
        ([1 +] N, D_llm), one for each image or clip.
        """
        if image_grid_thw is not None:
            return self._packed_features(pixel_values, image_grid_thw)
        outputs = self.vision_tower(pixel_values, **{**kwargs, "return_dict": True})
        latents, visual_states = outputs.latents, outputs.last_hidden_state  # (num_images, N, D)
        if self.config.llm_visual_input == "latent":
            visual_states = self.vision_tower.get_bottleneck_states(latents_to_tokens(latents))
        _, grids = pack_latents(latents, None)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self._project_rows(visual_states, latents.new_zeros(len(latents)), grids=grids[:1]),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        """As `get_image_features` for clips: (num_clips, 3, 1 + 4n, H, W), or packed, whose grids count frames."""
        if video_grid_thw is None:
            if pixel_values_videos.ndim != 5:
                shape = tuple(pixel_values_videos.shape)
                raise ValueError(
                    f"pixel_values_videos {shape} must be (B, 3, T, H, W), or packed with video_grid_thw."
                )
            patch_size = self.vision_tower.config.patch_size
            pixel_values_videos, video_grid_thw = pack_dense(pixel_values_videos, patch_size)
        return self._packed_features(pixel_values_videos, video_grid_thw)

    def _packed_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> BaseModelOutputWithPooling:
        tokens = self.get_latents(pixel_values, image_grid_thw)  # (total_tokens, C)
        grids = self.get_latent_grids(image_grids(image_grid_thw))
        states = run_by_grid(self._visual_rows, grids, [tokens], config=self.vision_tower.config)  # (total_tokens, D)
        return self._features_of(states, grids)

    def _features_of(self, visual_states: Tensor, grids: Sequence[Grid]) -> BaseModelOutputWithPooling:
        sigma = visual_states.new_zeros(len(grids))
        embeds = run_by_grid(self._project_rows, grids, [visual_states], [sigma], config=self.vision_tower.config)
        images = split_images(embeds, grids, self.config.num_time_tokens)
        return BaseModelOutputWithPooling(last_hidden_state=visual_states, pooler_output=images)

    # Placeholders

    def get_placeholder_types(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """1 at the placeholders of images, 2 at those of clips, 0 elsewhere, (B, L); found by their embedding without ids."""
        types = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        for kind, token_id in ((1, self.config.image_token_id), (2, self.config.video_token_id)):
            if token_id is None:
                continue
            if input_ids is not None:
                is_placeholder = input_ids == token_id
            else:
                token = torch.tensor(token_id, device=inputs_embeds.device)
                is_placeholder = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
            types = torch.where(is_placeholder, kind, types)
        return types

    def _embed_given(self, placeholder_types: Tensor, outputs: dict) -> tuple[Tensor, ...]:
        """The embeddings ([1 +] N, D_llm) of given images and clips, in the order of their placeholders."""
        embeds = [outputs[kind].pooler_output if kind in outputs else () for kind in ("image", "video")]
        if not all(map(len, embeds)):
            return (*embeds[0], *embeds[1])
        kinds = (placeholder_types[image_starts(placeholder_types > 0)] == 2).tolist()
        if [kinds.count(False), kinds.count(True)] != [*map(len, embeds)]:
            raise ValueError(
                f"input_ids have placeholders of {kinds.count(False)} images and {kinds.count(True)} clips, but got"
                f" {len(embeds[0])} images and {len(embeds[1])} clips."
            )
        sources = [*map(iter, embeds)]
        return tuple(next(sources[kind]) for kind in kinds)

    def _encode_given(
        self, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw, latents, mm_encoder_outputs, kwargs
    ) -> dict[str, BaseModelOutputWithPooling]:
        """The features of given images and clips, under "image" and "video"; {} without any."""
        encoded = {kind: output for kind, output in (mm_encoder_outputs or {}).items() if output is not None}
        for kind, pixels in (("image", pixel_values), ("video", pixel_values_videos)):
            if sum(source is not None for source in (pixels, latents, encoded.get(kind))) > 1:
                raise ValueError("Give images once: as pixel_values, latents or mm_encoder_outputs.")
        recorded = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, image_grid_thw, **{**recorded, "return_dict": True})
            encoded["image"] = features
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True)
        return encoded

    def _embed_latents(
        self, latents, image_grid_thw, sigma, num_sources: Tensor | None, condition_grad_scale: float
    ) -> Sequence[Tensor]:
        tokens, grids = pack_latents(latents, image_grid_thw)
        if sigma is None or sigma.shape != (len(grids),):
            shape = None if sigma is None else tuple(sigma.shape)
            raise ValueError(f"latents of {len(grids)} images need sigma of shape ({len(grids)},), got {shape}.")
        if num_sources is not None and num_sources.shape != (len(grids),):
            raise ValueError(f"num_sources {tuple(num_sources.shape)} must be ({len(grids)},), one for each image.")
        counts = None if num_sources is None else num_sources.tolist()
        embeds = self.get_image_embeds(tokens, sigma, grids, counts)
        images = split_images(embeds, grids, self.config.num_time_tokens)
        if condition_grad_scale != 1:
            images = map(scale_gradient, images, torch.where(sigma == 0, condition_grad_scale, 1.0))
        return tuple(images)
