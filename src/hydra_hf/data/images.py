"""Batches of images without text, for the vision tower."""

import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hydra_hf.modeling import HydraImageProcessor

from .readers import SourceMix
from .sources import Source, Sources
from .tasks import TASKS


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


class ImageBatches:
    """Images without text, for the tokenizer: image `step * batch_size + row` of the sources with images, of any task,
    the middle of each image, mirrored with probability 0.5 (our choice).

    Args:
        batch_size: images of a step, of all processes and micro steps together.

    Raises ValueError for streams, since an image is asked for by its number.
    """

    def __init__(self, sources: tuple[Source, ...], image_size: int, seed: int, *, batch_size: int):
        with_images = tuple(source for source in sources if TASKS[source.task].num_images)
        if not with_images:
            raise ValueError(f"Got {len(sources)} sources and none of a task with images, expected at least one.")
        if encoded := [source.path for source in with_images if source.latents]:
            raise ValueError(
                f"Got latents for {encoded}, but a vision tower is trained on pixels: leave latents=... out."
            )
        if streams := [source.path for source in with_images if source.is_stream]:
            raise ValueError(f"Got the streams {streams}, expected sources that images can be taken from by number.")
        size = {"height": image_size, "width": image_size}
        image_processor = HydraImageProcessor(size=size, patch_size=image_size)
        self.mix = SourceMix(with_images, image_processor, seed, lambda source, columns: bool(columns.images))
        self.seed, self.batch_size = seed, batch_size
        self.threads = ThreadPoolExecutor(max_workers=Sources(with_images).num_workers or 1)

    @property
    def num_skipped(self) -> dict[str, int]:
        """Records that could not be read so far, by "path: reason"."""
        return self.mix.num_skipped

    def __call__(self, step: int, rows: range) -> Tensor:
        """The rows of a global step (len(rows), 3, S, S) in [-1, 1]."""
        return torch.stack(list(self.threads.map(self._image, [step * self.batch_size + row for row in rows])))

    def _image(self, number: int) -> Tensor:
        image = self.mix.read(number, lambda reader, record, place: reader.image(record))
        is_mirrored = random.Random(repr((self.seed, "mirror", number))).random() < 0.5
        return image.flip(-1) if is_mirrored else image
