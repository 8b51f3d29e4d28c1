"""Clips to packed `pixel_values_videos` in [-1, 1]: which frames are taken, and which size they get.

A frame is treated as `HydraImageProcessor` treats an image, so an image is a clip of one frame to the bit.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.processing_utils import VideosKwargs
from transformers.utils import TensorType
from transformers.video_processing_utils import BaseVideoProcessor, BatchFeature
from transformers.video_utils import VideoInput, VideoMetadataType, make_batched_metadata

from .grid import check_num_frames, image_grid, pack_images
from .image_processing_hydra import HydraImageProcessor, center_box
from .video_reading import ClipMetadata, read_video, stack_frames


ROUNDING_SECONDS = 0.01  # to which files round the times of their frames: GIF to hundredths, WebM to thousandths


class HydraVideoProcessorKwargs(VideosKwargs, total=False):
    """
    Args:
        patch_size: side of the tokenizer's patch; heights and widths have to be multiples of it.
        max_input_pixels: a frame with more pixels is refused before it is decoded.
        temporal_patch_size: frames after the first that become one latent frame.
    """

    patch_size: int
    max_input_pixels: int
    temporal_patch_size: int


class HydraVideoProcessor(HydraImageProcessor, BaseVideoProcessor):
    """
    Clips to `pixel_values_videos` (total_patches, 3 p p) in [-1, 1] and `video_grid_thw` (num_clips, 3), frame by frame as images
    are packed. A grid (t, h, w) counts the frames of the clip in t, not its latent frames, of which there are 1 + (t - 1) / 4.

    Args:
        size, patch_size, max_input_pixels: as `HydraImageProcessor` has them, for each frame.
        temporal_patch_size: frames after the first that become one latent frame; a clip has 1 + 4n frames when it is 4.
        do_sample_frames: whether frames are chosen from a clip, evenly spaced in time; else the clip is taken as it is.
        num_frames: at most so many, 1 + 4n; a shorter clip gives as many as it has.
        fps: in the place of `num_frames`, about so many a second: the clip is seen whole, in the nearest 1 + 4n frames, and a frame that is shown for long is taken more than once.
    """

    do_sample_frames = True
    num_frames = 17
    fps = None
    temporal_patch_size = 4
    valid_kwargs = HydraVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    reads = "video"
    free_settings = HydraImageProcessor.free_settings | {
        "do_sample_frames",
        "num_frames",
        "fps",
        "temporal_patch_size",
    }

    def __init__(self, **kwargs):
        super().__init__(**_checked(kwargs))

    def preprocess(self, videos: VideoInput, **kwargs) -> BatchFeature:
        return super().preprocess(videos, **_checked(kwargs))

    # Which frames

    def fetch_videos(
        self, video_url_or_urls: str | list, sample_indices_fn: Callable[..., Sequence[int]] | None = None
    ) -> tuple:
        """Frames (T, H, W, 3) and metadata of a clip's file, or of each of a list."""
        if isinstance(video_url_or_urls, (list, tuple)):
            return tuple(zip(*[self.fetch_videos(url, sample_indices_fn) for url in video_url_or_urls]))
        frames, metadata = read_video(video_url_or_urls, sample_indices_fn, self.max_input_pixels)
        return frames.permute(0, 2, 3, 1).numpy(), metadata

    def sample_frames(
        self,
        metadata: ClipMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        temporal_patch_size: int | None = None,
        **kwargs,
    ) -> np.ndarray:
        """The numbers of the frames to take, see the class; all of them when neither `num_frames` nor `fps` is given."""
        if num_frames is not None and fps is not None:
            raise ValueError(f"Got {num_frames=} and {fps=}, expected one of them.")
        group = self.temporal_patch_size if temporal_patch_size is None else temporal_patch_size
        total, times, duration = metadata.total_num_frames, metadata.frame_times, metadata.duration
        if num_frames is not None:
            check_num_frames(num_frames, group)
            num_groups = (min(num_frames, total) - 1) // group
        elif fps is None:
            return np.arange(total)
        elif metadata.fps is None:
            raise ValueError(
                f"Got {fps=} for a clip without times, expected num_frames, or video_metadata with its fps."
            )
        else:
            num_groups = math.floor(max(0, total / metadata.fps * fps - 1) / group + 0.5)
        if times is None:
            times, duration = np.arange(total), total
        num_frames = 1 + group * num_groups
        wanted = np.arange(num_frames) * duration / num_frames + min(ROUNDING_SECONDS, duration / total / 4)
        return np.searchsorted(times, wanted, side="right") - 1

    def clips(self, videos: VideoInput) -> list[str | np.ndarray | Tensor]:
        """Each clip as the path or URL of a file, or as its frames in one array; from all nestings that transformers takes."""
        if clips := self._flat(videos):
            return clips
        raise ValueError("Got no clips, expected at least one.")

    def _flat(self, videos: VideoInput, depth: int = 0) -> list:
        if isinstance(videos, (str, os.PathLike)):
            return [os.fspath(videos)]
        if isinstance(videos, (np.ndarray, Tensor)) and videos.ndim > 3:
            return [*videos] if videos.ndim == 5 else [videos]
        if _is_frame(videos):
            return [self._clip([videos])]
        if not isinstance(videos, (list, tuple)):
            raise ValueError(
                f"Got {type(videos).__name__} for a clip, expected a path, a URL, frames of PIL, numpy or torch, or a list."
            )
        is_paths_of_frames = depth == 2 and all(isinstance(item, (str, os.PathLike)) for item in videos)
        if videos and (is_paths_of_frames or all(map(_is_frame, videos))):
            return [self._clip(videos)]
        return [clip for item in videos for clip in self._flat(item, depth + 1)]

    def _clip(self, frames: Sequence) -> np.ndarray | Tensor:
        """One array of frames, which are upright RGB levels (T, H, W, 3) if they came as pictures or paths of pictures."""
        return stack_frames([self._array(frame) for frame in self.fetch_images([*frames])])

    def _array(self, frame: Image.Image | np.ndarray | Tensor) -> np.ndarray | Tensor:
        if not isinstance(frame, Image.Image):
            return frame
        return self.process_image(frame, max_input_pixels=self.max_input_pixels).permute(1, 2, 0).numpy()

    def _decode_and_sample_videos(
        self,
        videos: VideoInput,
        video_metadata: VideoMetadataType | None,
        do_sample_frames: bool | None = None,
        sample_indices_fn: Callable[..., Sequence[int]] | None = None,
    ) -> tuple[list, list[ClipMetadata]]:
        clips = self.clips(videos)
        if video_metadata is None:
            video_metadata = [ClipMetadata(total_num_frames=len(clip)) for clip in clips]
        metadata = make_batched_metadata(clips, video_metadata=video_metadata)
        pairs = [self._sampled(clip, known, sample_indices_fn) for clip, known in zip(clips, metadata)]
        return [clip for clip, _ in pairs], [known for _, known in pairs]

    def _sampled(self, clip, metadata, sample_indices_fn) -> tuple[np.ndarray | Tensor, ClipMetadata]:
        if isinstance(clip, str):
            return self.fetch_videos(clip, sample_indices_fn)
        metadata = ClipMetadata(**metadata)
        if sample_indices_fn is None:
            metadata.frames_indices = metadata.frames_indices or [*range(len(clip))]
            return clip, metadata
        if metadata.total_num_frames != len(clip):
            raise ValueError(f"Got {len(clip)} frames and {metadata.total_num_frames=}, expected as many.")
        metadata.frames_indices = [int(index) for index in sample_indices_fn(metadata=metadata)]
        return clip[metadata.frames_indices], metadata

    # Levels: what training keeps in memory, a quarter of the pixels

    def given_levels(self, clip: str | Path | BytesIO) -> Tensor:
        """The RGB levels from 0 to 255, (3, T, H, W), of the frames that a call of a plain processor takes of a clip's file."""
        frames = self._read_frames(clip)  # (T, 3, H, W)
        return self._resized_levels(frames, *self.output_size(*frames.shape[-2:])).transpose(0, 1)

    def generated_levels(self, clip: str | Path | BytesIO) -> Tensor:
        """As `given_levels`, for a clip that the model learns to generate: its middle part, at its `generated_size`."""
        frames = self._read_frames(clip)
        size = self.generated_size(*frames.shape[-2:])
        top, left, bottom, right = center_box(*frames.shape[-2:], *size)
        return self._resized_levels(frames[..., top:bottom, left:right], *size).transpose(0, 1)

    def _read_frames(self, clip: str | Path | BytesIO) -> Tensor:
        choose = (
            partial(self.sample_frames, num_frames=self.num_frames, fps=self.fps) if self.do_sample_frames else None
        )
        frames, _ = read_video(clip, choose, self.max_input_pixels)
        check_num_frames(len(frames), self.temporal_patch_size)
        return frames

    # Which pixels

    def _prepare_input_videos(
        self,
        videos: list,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | str | None = None,
    ) -> list[Tensor]:
        options = (do_convert_rgb, input_data_format, self.max_input_pixels, device)
        return [torch.stack([self.process_image(frame, *options) for frame in video]) for video in videos]

    def _preprocess(
        self,
        videos: list[Tensor],
        size: SizeDict,
        patch_size: int,
        temporal_patch_size: int,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        frames, grids = [], []
        for video in videos:
            check_num_frames(len(video), temporal_patch_size)
            height, width = self._resized(*video.shape[-2:], size, patch_size)
            own_size = SizeDict(height=height, width=width)
            processed = BaseVideoProcessor._preprocess(self, [video], size=own_size, **kwargs)["pixel_values_videos"][
                0
            ]
            frames += [*processed]
            grids.append((len(processed), *image_grid(*processed.shape[-2:], patch_size)[1:]))
        packed, _ = pack_images(frames, patch_size)
        return BatchFeature(
            {"pixel_values_videos": packed, "video_grid_thw": torch.tensor(grids)}, tensor_type=return_tensors
        )


def _checked(kwargs: dict) -> dict:
    """The settings; a number of frames that is given takes the place of the default rate, and a rate that of the default number."""
    if kwargs.get("temporal_patch_size", 1) < 1:
        raise ValueError(f"Got temporal_patch_size={kwargs['temporal_patch_size']}, expected at least 1.")
    for given, other in (("fps", "num_frames"), ("num_frames", "fps")):
        if kwargs.get(given) is not None:
            kwargs = {other: None, **kwargs}
    return kwargs


def _is_frame(value) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim < 4)
