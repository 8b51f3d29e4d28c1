"""Which data sets a stage is trained on, as values: `Sources` in a recipe, TASK=PATH on the command line."""

import math
import os
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .tasks import TASKS, check_task


HUB = "hub:"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set for one task.

    Args:
        path: folder of images or clips, *.json, *.jsonl, *.parquet or *.tar (globs, {000..123}), or hub:owner/name.
        weight: share of the task's samples, relative to the task's other sources.
        split: that of a data set on the Hub; for all others a slice, such as "train[:1000]".
        image_root: folder that paths of images and clips in JSON and Parquet are relative to; None is that of the first file.
        latents: folder of what `hydra prepare latents` made of the images, which are then neither decoded nor encoded.
        streaming: Parquet is read where it is, without a copy in the cache, with files and row groups shuffled, and the rows
            inside them; a data set on the Hub is read from front to back in shuffled blocks. For what is too large to copy.
        targets: folder of the images to be painted, under the relative paths of the given images (also as .png or .jpg); None
            where records hold them, in a column with the name of the task.
        prompts: text file with the prompts for painting, one per line; None is `data.prompts.PROMPTS`.
        condition_image_size: the given image has at most as many pixels as a square of this side, while the painted one keeps
            its size. A given image that holds every detail can be copied instead of understood.
    """

    task: str
    path: str
    weight: float = 1.0
    split: str = "train"
    image_root: str | None = None
    latents: str | None = None
    streaming: bool = False
    targets: str | None = None
    prompts: str | None = None
    condition_image_size: int | None = None

    def __post_init__(self):
        check_task(self.task, f"The source {self.path!r}")
        if not self.path.removeprefix(HUB):
            raise ValueError(f"The source of task {self.task!r} has an empty path.")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"{self.path}: weight={self.weight} must be a number above 0.")
        if self.latents is not None and self.is_stream:
            raise ValueError(
                f"{self.path}: latents={self.latents} are kept by number, and the records of a stream have none."
            )
        if self.latents is not None and not TASKS[self.task].keeps_latents:
            kept = [name for name, task in TASKS.items() if task.keeps_latents]
            raise ValueError(
                f"{self.path}: latents are kept for the tasks {kept}, got task={self.task!r}: leave latents=... out."
            )
        self._check_painting()

    def _check_painting(self) -> None:
        task = TASKS[self.task]
        given = [name for name in ("targets", "prompts", "condition_image_size") if getattr(self, name) is not None]
        if given and task.paint is None:
            painted = [name for name, row in TASKS.items() if row.paint is not None]
            raise ValueError(f"{self.path}: {given[0]} is for the tasks {painted}, got task={self.task!r}.")
        if self.targets is not None and not task.target:
            raise ValueError(
                f"{self.path}: what {self.task!r} paints is the image itself, got targets={self.targets!r}."
            )
        if self.targets is not None and self.path.startswith(HUB):
            raise ValueError(
                f"{self.path}: targets={self.targets!r} is for images in files; on the Hub, targets are a column"
                f" {task.target!r}."
            )
        if self.condition_image_size is not None and self.condition_image_size < 1:
            raise ValueError(f"{self.path}: condition_image_size={self.condition_image_size} must be at least 1.")

    @property
    def is_stream(self) -> bool:
        """Whether the source can only be read from front to back."""
        return self.streaming and self.path.startswith(HUB)


def parse_source(text: str) -> Source:
    """The source written as `understand=llava.jsonl,image_root=images,weight=2`. Raises ValueError for a malformed one."""
    task, separator, rest = text.partition("=")
    path, *settings = rest.split(",")
    if not separator:
        raise ValueError(f"The source {text!r} is not TASK=PATH, such as generate=images/*.tar,weight=2.")
    known = {field.name for field in fields(Source) if field.default is not MISSING}
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in known or not value or name in values:
            raise ValueError(
                f"The source {text!r} has {setting!r}, expected NAME=VALUE of {sorted(known)}, each once."
            )
        values[name] = value
    try:
        values["weight"] = float(values.get("weight", 1))
        values["streaming"] = {"true": True, "false": False}[values.get("streaming", "false")]
        if "condition_image_size" in values:
            values["condition_image_size"] = int(values["condition_image_size"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"The source {text!r} has {error.args[0]!r}, expected a number or true or false.") from error
    return Source(task=task, path=path, **values)


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Sources:
    """Data sets as the data of a stage. Opening them needs `datasets`: pip install hydra_hf[train]."""

    sources: tuple[Source, ...]

    @property
    def is_streaming(self) -> bool:
        return any(source.is_stream for source in self.sources)

    @property
    def has_clips(self) -> bool:
        return any(TASKS[source.task].num_videos for source in self.sources)

    @property
    def num_workers(self) -> int:
        """Processes that read ahead: the CPU cores that each training process on this machine has besides its own, up to 8;
        none for streams, which are read in order."""
        num_cores = count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return 0 if self.is_streaming else min(8, max(0, num_cores - 1))

    def bundles(
        self, stage, processor, seed: int, *, max_length: int, process_index: int = 0, num_processes: int = 1,
        accumulation: int = 1,
    ):  # fmt: skip
        """One bundle of tasks for each micro step of this process."""
        from .bundles import Bundles
        from .readers import create_readers

        readers = create_readers(
            self.sources, stage.tasks, processor, seed, drop_prompt=stage.drop_prompt, max_length=max_length,
            process_index=process_index, num_processes=num_processes,
        )  # fmt: skip
        return Bundles(
            readers, stage.tasks, processor, num_steps=stage.num_steps, process_index=process_index,
            num_processes=num_processes, accumulation=accumulation,
        )  # fmt: skip

    def images(self, image_sizes: tuple[int, ...], batch_size: int, seed: int):
        """Images to train a vision tower on."""
        from .images import ImageBatches

        return ImageBatches(self.sources, image_sizes, seed, batch_size=batch_size)

    def clips(self, image_size: int, num_frames: int, batch_size: int, seed: int):
        """Clips to train a vision tower on."""
        from .images import ClipBatches

        return ClipBatches(self.sources, image_size, num_frames, seed, batch_size=batch_size)

    def sample_prompts(self, seed: int) -> tuple[str, ...]:
        """(), since data sets have no prompts of their own; a recipe has them."""
        return ()
