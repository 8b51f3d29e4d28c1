"""Batches of images and clips without text, for the vision tower."""

import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hydra_hf.modeling import HydraImageProcessor, HydraVideoProcessor
from hydra_hf.modeling.image_processing_hydra import as_pixel_values

from .readers import SourceMix, check_reads_clips
from .records import RecordReader
from .sources import Source, Sources
from .tasks import TASKS, UnreadableRecordError


class Batches(Protocol):
    """Rows of the batch of a step, (len(rows), 3, H, W) or (len(rows), 3, T, H, W) in [-1, 1], the same whenever and wherever
    they are read."""

    num_skipped: dict[str, int]

    def __call__(self, step: int, rows: range) -> Tensor: ...


@dataclass(frozen=True)
class HeldOut:
    """What a vision tower is measured on; None measures no clips."""

    images: Batches
    clips: Batches | None = None


class MixedBatches:
    """Images, or in a share of the steps clips, one in the place of `images_per_clip` rows.

    What a step has is decided by its number and the seed, so all processes have the same.
    """

    def __init__(self, images: Batches, clips: Batches, clip_share: float, images_per_clip: int, seed: int):
        self.images, self.clips = images, clips
        self.clip_share, self.images_per_clip, self.seed = clip_share, images_per_clip, seed

    @property
    def num_skipped(self) -> dict[str, int]:
        return {**self.images.num_skipped, **self.clips.num_skipped}

    def has_clips(self, step: int) -> bool:
        """Whether the batch of a step is of clips."""
        return random.Random(repr((self.seed, "clip", step))).random() < self.clip_share

    def __call__(self, step: int, rows: range) -> Tensor:
        """Rows of images; those of clips are `images_per_clip` times fewer."""
        if not self.has_clips(step):
            return self.images(step, rows)
        return self.clips(step, range(rows.start // self.images_per_clip, rows.stop // self.images_per_clip))


def check_range(pixel_values: Tensor) -> Tensor:
    """The pixels, if they are in [-1, 1]. Raises ValueError if not, before they mislead a judge."""
    low, high = pixel_values.aminmax()
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"Pixels range from {low.item():.3f} to {high.item():.3f}, expected [-1, 1].")
    return pixel_values


class ReadAhead:
    """The rows of a process, micro step after micro step; a thread reads the next ones ahead."""

    def __init__(self, batches: Batches, rows: list[range]):
        self.batches, self.rows = batches, rows
        self.reader = ThreadPoolExecutor(max_workers=1)
        self.ahead: dict[tuple[int, int], Future] = {}

    def __call__(self, step: int, micro_step: int) -> Tensor:
        """Rows `micro_step` of a step, in [-1, 1]."""
        pixel_values = self._find(step, micro_step).result()
        following = divmod(step * len(self.rows) + micro_step + 1, len(self.rows))
        self.ahead = {following: self._find(*following)}
        return check_range(pixel_values)

    def _find(self, step: int, micro_step: int) -> Future:
        if (step, micro_step) in self.ahead:
            return self.ahead[step, micro_step]
        return self.reader.submit(self.batches, step, self.rows[micro_step])


def size_shares(sizes: Sequence[int]) -> dict[int, float]:
    """How often a step has images of each side: in proportion to 1 / size^2, so that all sizes have as many pixels (our choice)."""
    weights = [1 / size**2 for size in sizes]
    return {size: weight / sum(weights) for size, weight in zip(sizes, weights)}


class ImageBatches:
    """Images without text, for the tokenizer: image `step * batch_size + row` of the sources with images, of any task,
    the middle of each image, mirrored with probability 0.5 (our choice).

    Args:
        image_sizes: sides of the square images; a step has one of them, see `size_shares`.
        batch_size: images of a step, of all processes and micro steps together.

    Raises ValueError for streams, since an image is asked for by its number.
    """

    def __init__(self, sources: tuple[Source, ...], image_sizes: tuple[int, ...], seed: int, *, batch_size: int):
        self.sources = _numbered(sources, "images")
        self.processors = {size: HydraImageProcessor(size=_square(size), patch_size=size) for size in image_sizes}
        first = self.processors[image_sizes[0]]
        self.mix = SourceMix(self.sources, first, seed, lambda source, columns: bool(columns.images))
        self.seed, self.batch_size = seed, batch_size
        self.threads = _threads(self.sources)

    @property
    def num_skipped(self) -> dict[str, int]:
        """Records that could not be read so far, by "path: reason"."""
        return self.mix.num_skipped

    def size_of(self, step: int) -> int:
        """The side of a step's images."""
        shares = size_shares([*self.processors])
        return random.Random(repr((self.seed, "size", step))).choices([*shares], [*shares.values()])[0]

    def __call__(self, step: int, rows: range) -> Tensor:
        """The rows of a global step (len(rows), 3, S, S) in [-1, 1]."""
        image = partial(self._image, self.processors[self.size_of(step)])
        return torch.stack(list(self.threads.map(image, [step * self.batch_size + row for row in rows])))

    def _image(self, processor: HydraImageProcessor, number: int) -> Tensor:
        def convert(reader: RecordReader, record: dict, place: int) -> Tensor:
            reader = copy(reader)
            reader.image_processor = processor
            return reader.image(record)

        return _mirrored(self.mix.read(number, convert), self.seed, number)


class ClipBatches:
    """Clips without text, for the tokenizer: clip `step * batch_size + row` of the sources of tasks with clips, the middle of
    each frame, mirrored with probability 0.5. Shorter ones are skipped and counted, as those that cannot be read.

    Args:
        num_frames: 1 + 4n, evenly spaced in time.
        batch_size: clips of a step, of all processes and micro steps together.

    Raises ValueError as `ImageBatches` does.
    """

    def __init__(self, sources: tuple[Source, ...], image_size: int, num_frames: int, seed: int, *, batch_size: int):
        self.sources, self.num_frames = _numbered(sources, "videos"), num_frames
        settings = {"size": _square(image_size), "patch_size": image_size}
        image_processor = HydraImageProcessor(**settings)
        video_processor = HydraVideoProcessor(**settings, num_frames=num_frames)
        check_reads_clips(self.sources[0].task, video_processor)
        self.mix = SourceMix(
            self.sources, image_processor, seed, lambda source, columns: bool(columns.videos),
            video_processor=video_processor,
        )  # fmt: skip
        self.seed, self.batch_size = seed, batch_size
        self.threads = _threads(self.sources)

    @property
    def num_skipped(self) -> dict[str, int]:
        """As in `ImageBatches`."""
        return self.mix.num_skipped

    def __call__(self, step: int, rows: range) -> Tensor:
        """The rows of a global step (len(rows), 3, T, S, S) in [-1, 1]."""
        return torch.stack(list(self.threads.map(self._clip, [step * self.batch_size + row for row in rows])))

    def _clip(self, number: int) -> Tensor:
        return _mirrored(self.mix.read(number, self._convert), self.seed, number)

    def _convert(self, reader: RecordReader, record: dict, place: int) -> Tensor:
        videos = reader.videos(record)
        if not videos:
            raise UnreadableRecordError("no clip")
        levels = reader.clip(videos[0], is_generated=True)
        if levels.shape[1] != self.num_frames:
            raise UnreadableRecordError(f"a clip of fewer than {self.num_frames} frames")
        return as_pixel_values(levels)


def _numbered(sources: tuple[Source, ...], kind: str) -> tuple[Source, ...]:
    """The sources of tasks with "images" or "videos". Raises ValueError if there are none, or if one has no pixels or no numbers."""
    found = tuple(source for source in sources if getattr(TASKS[source.task], f"num_{kind}"))
    if not found:
        raise ValueError(f"Got {len(sources)} sources and none of a task with {kind}, expected at least one.")
    if encoded := [source.path for source in found if source.latents]:
        raise ValueError(f"Got latents for {encoded}, but a vision tower is trained on pixels: leave latents=... out.")
    if streams := [source.path for source in found if source.is_stream]:
        raise ValueError(f"Got the streams {streams}, expected sources that {kind} can be taken from by number.")
    return found


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _threads(sources: tuple[Source, ...]) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=Sources(sources).num_workers or 1)


def _mirrored(pixel_values: Tensor, seed: int, number: int) -> Tensor:
    """Half of all images or clips, by their number, from left to right."""
    is_mirrored = random.Random(repr((seed, "mirror", number))).random() < 0.5
    return pixel_values.flip(-1) if is_mirrored else pixel_values
