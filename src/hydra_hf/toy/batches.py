"""The toy world as training data: the images and conversations of any step, made from its number."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hydra_hf.data.collate import collate
from hydra_hf.data.images import Batches
from hydra_hf.data.sample import Sample
from hydra_hf.data.seeds import hashed_generator
from hydra_hf.modeling import HydraProcessor

from .clips import NUM_FRAMES, ToyClips, render_clips
from .edits import ToyEdits
from .language import PAINTED, ToyLanguage, chat
from .world import CANVAS, ToyWorld


@dataclass(frozen=True, kw_only=True)
class ToyData:
    """The toy world as the data of a stage, instead of data sets.

    Args:
        max_objects: the most objects in a scene (a curriculum).
        canvases: sizes (height, width) of the images. A step has one of them, large ones less often, since a step has the
            same number of images of any size.
        first_canvas_share: how often it is the first of them.
        questions_per_image: the most turns about one image or clip.
        question_weights: type -> how often it is asked about an image; None asks every type equally often.
        clip_lengths: numbers of frames, 4n + 1. The clips of a task have one of them in a step, one that is listed twice
            twice as often. Clips are 64 px.
        copy_share: share of edits that ask for nothing, so that the picture stays as it is.
        color_field_share: share of edits on backgrounds that only the source tells.
        unknown_share: share of prompts with an unknown word, and an image of known things.
        is_held_out: images that training never shows; for the vision tower the same at every step.
    """

    difficulty: int = 1
    canvases: tuple[tuple[int, int], ...] = (CANVAS,)
    first_canvas_share: float = 0.5
    max_objects: int = 4
    questions_per_image: int = 4
    question_weights: dict[str, int] | None = None
    clip_lengths: tuple[int, ...] = (NUM_FRAMES,)
    copy_share: float = 0.0
    color_field_share: float = 0.0
    unknown_share: float = 0.0
    is_held_out: bool = False
    is_streaming: ClassVar[bool] = False
    has_clips: ClassVar[bool] = True
    num_workers: ClassVar[int] = 0

    def bundles(
        self, stage: Any, processor: HydraProcessor, seed: int, *, max_length: int, **place: int
    ) -> "ToyBundles":
        """One bundle of tasks for each micro step; `place` as in `ToyBundles`."""
        return ToyBundles(self, processor, stage, seed, **place)

    def images(self, image_sizes: tuple[int, ...], batch_size: int, seed: int) -> Batches:
        """Images to train a vision tower on, or to measure it on."""
        world = ToyWorld(self.difficulty)
        if self.is_held_out:
            return ToyHeldOut(world, batch_size, seed)
        return ToyBatches(world, batch_size, seed, self.canvases, self.first_canvas_share)

    def clips(self, image_size: int, num_frames: int, batch_size: int, seed: int) -> Batches:
        """Clips of 64 px to train a vision tower on, or to measure it on."""
        clips, split = ToyClips(ToyWorld(self.difficulty)), "test" if self.is_held_out else "train"
        return ToyClipBatches(clips, num_frames, batch_size, seed, split)

    def sample_prompts(self, seed: int) -> tuple[str, ...]:
        """Held-out prompts to generate images of while training."""
        generator = hashed_generator(seed, 0)
        prompts, _ = ToyLanguage(ToyWorld(self.difficulty)).sample_prompts(24, generator, split="test")
        return tuple(prompt.text for prompt in prompts)


def choose_canvas(
    canvases: tuple[tuple[int, int], ...], generator: torch.Generator, first_share: float = 0.5
) -> tuple[int, int]:
    """The canvas of a step, see `ToyData`."""
    if len(canvases) == 1:
        return canvases[0]
    weights = torch.tensor([1 / (height * width) for height, width in canvases])
    weights[0] = weights[1:].sum() * first_share / (1 - first_share)
    return canvases[int(torch.multinomial(weights, 1, generator=generator))]


def toy_images(
    world: ToyWorld, num_images: int, generator: torch.Generator, canvas: tuple[int, int] = CANVAS
) -> Tensor:
    """A batch (B, 3, H, W) of scenes: three fifths as they look, one fifth depth maps, one fifth segmentations."""
    num_maps = num_images // 5
    scenes = world.sample_scenes(num_images, generator, canvas=canvas)
    depth, segments = world.render_depth(scenes[:num_maps]), world.render_segmentation(scenes[num_maps : 2 * num_maps])
    return torch.cat([depth, segments, world.render(scenes[2 * num_maps :])])


class ToyBatches:
    """`toy_images` as training data."""

    def __init__(
        self,
        world: ToyWorld,
        batch_size: int,
        seed: int,
        canvases: tuple[tuple[int, int], ...] = (CANVAS,),
        first_canvas_share: float = 0.5,
    ):
        self.world, self.batch_size, self.seed = world, batch_size, seed
        self.canvases, self.first_canvas_share, self.num_skipped = canvases, first_canvas_share, {}

    def __call__(self, step: int, rows: range) -> Tensor:
        generator = hashed_generator(self.seed, step)
        canvas = choose_canvas(self.canvases, generator, self.first_canvas_share)
        return toy_images(self.world, self.batch_size, generator, canvas)[rows.start : rows.stop]


class ToyHeldOut:
    """Scenes that the toy world never shows in training, the same at every step."""

    def __init__(self, world: ToyWorld, num_images: int, seed: int):
        self.world, self.num_skipped = world, {}
        self.scenes = world.sample_scenes(num_images, hashed_generator(seed, 0), split="test")

    def __call__(self, step: int, rows: range) -> Tensor:
        return self.world.render(self.scenes[rows.start : rows.stop])


class ToyClipBatches:
    """Clips of a split, half of them scattered (see `ToyClips.sample`); those of the test split are the same at every step."""

    def __init__(self, clips: ToyClips, num_frames: int, num_clips: int, seed: int, split: str = "train"):
        self.clips, self.num_frames, self.num_clips, self.seed, self.split = clips, num_frames, num_clips, seed, split
        self.num_skipped = {}

    def __call__(self, step: int, rows: range) -> Tensor:
        generator = hashed_generator(self.seed, 0 if self.split == "test" else step)
        num_scattered, chosen = self.num_clips // 2, []
        for count, scattered in ((num_scattered, True), (self.num_clips - num_scattered, False)):
            chosen += self.clips.sample(
                count, generator, split=self.split, scattered=scattered, num_frames=self.num_frames
            )
        return render_clips(self.clips.world, chosen[rows.start : rows.stop])


class ToyBundles(Dataset):
    """For the toy world what `data.bundles.Bundles` is for data sets: bundle `index` of a stage, the same for whoever asks.

    The whole batch of the step is made, and of each task every (num_processes x accumulation)-th row is kept.
    """

    def __init__(
        self,
        data: ToyData,
        processor: HydraProcessor,
        stage: Any,
        seed: int,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        accumulation: int = 1,
    ):
        self.data, self.language = data, ToyLanguage(ToyWorld(data.difficulty))
        self.clips, self.edits = ToyClips(self.language.world), ToyEdits(self.language.world)
        self.processor, self.stage, self.seed = processor, stage, seed
        self.process_index, self.num_processes, self.accumulation = process_index, num_processes, accumulation

    def __len__(self) -> int:
        return self.stage.num_steps * self.accumulation

    def __getitem__(self, index: int) -> dict:
        step, micro_step = divmod(index, self.accumulation)
        generator = hashed_generator(self.seed, step)
        canvas = choose_canvas(self.data.canvases, generator, self.data.first_canvas_share)
        bundle, rows = {}, {}
        for task, count in self.stage.tasks.items():
            samples = self.samples(task, generator, canvas)
            first = self.process_index + micro_step * self.num_processes
            mine = list(range(first, count, self.num_processes * self.accumulation))
            rows[task] = mine or [count]  # a blank sample, so that every process runs the same forwards
            bundle[task] = collate([samples[row] for row in mine or [0]], self.processor)
            bundle[task]["num_samples"] = len(mine)
        return {**bundle, "rows": rows, "step": step, "micro_step": micro_step, "skipped": {}}

    def state_dict(self, step: int) -> dict:
        """{}: the step is all that a resumed run needs."""
        return {}

    def samples(self, task: str, generator: torch.Generator, canvas: tuple[int, int] = CANVAS) -> list[Sample]:
        """All samples of one task for a step. Raises ValueError for a task that the toy world does not have."""
        data, count = self.data, self.stage.tasks[task]
        split = "test" if data.is_held_out else "train"
        if task == "generate":
            return self.language.generate_samples(
                count, generator, max_objects=data.max_objects, drop_prompt=self.stage.drop_prompt,
                unknown_share=data.unknown_share, canvas=canvas, split=split,
            )  # fmt: skip
        if task == "understand":
            return self.language.understand_samples(
                count, generator, data.questions_per_image, max_objects=data.max_objects, canvas=canvas,
                weights=data.question_weights, split=split,
            )  # fmt: skip
        if task in PAINTED:
            return self.language.paint_samples(
                task, count, generator, max_objects=data.max_objects, canvas=canvas, split=split
            )
        if task == "edit":
            return self.edits.samples(
                count, generator, drop_prompt=self.stage.drop_prompt, copy_share=data.copy_share,
                color_field_share=data.color_field_share, max_objects=data.max_objects, canvas=canvas, split=split,
            )  # fmt: skip
        if task in ("video_understand", "video_generate"):
            return self.clip_samples(task, generator, split)
        tasks = ", ".join(("generate", "understand", *PAINTED, "edit", "video_understand", "video_generate"))
        raise ValueError(
            f"{task=} of stage {self.stage.name!r} is not a task of the toy world, expected one of {tasks}."
        )

    def clip_samples(self, task: str, generator: torch.Generator, split: str) -> list[Sample]:
        """Clips with questions and answers, or captions and their clips: the video parts hold frames (3, T, H, W)."""
        count, lengths = self.stage.tasks[task], self.data.clip_lengths
        num_frames = lengths[int(torch.randint(len(lengths), (), generator=generator))]
        options = {"num_frames": num_frames, "split": split}
        if task == "video_understand":
            clips, asked = self.clips.sample_turns(count, generator, self.data.questions_per_image, **options)
            turns = [
                [pair for turn in of_clip for pair in (("user", turn.question), ("assistant", turn.answer))]
                for of_clip in asked
            ]
            return [
                chat(task, [("user", video), *said])
                for video, said in zip(render_clips(self.clips.world, clips), turns)
            ]
        captions, clips = self.clips.sample_prompts(count, generator, **options)
        is_dropped = torch.rand(count, generator=generator) < self.stage.drop_prompt
        return [
            chat(task, [("user", "" if dropped else caption), ("assistant", video)])
            for caption, video, dropped in zip(captions, render_clips(self.clips.world, clips), is_dropped.tolist())
        ]
