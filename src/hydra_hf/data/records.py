"""Records of data sets to samples, and what is wrong with a record."""

import base64
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from hydra_hf.modeling import HydraImageProcessor, HydraVideoProcessor
from hydra_hf.modeling.image_processing_hydra import as_pixel_values, center_crop, check_image_size, normalize_levels

from .chats import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, list_in, open_part, read_turn, text_part
from .columns import Columns
from .columns import find_columns as find_columns  # callers import both columns and readers from here
from .edits import check_same_aspect, one_edit
from .latents import StaleLatentsError, StoredLatents
from .painting import (
    PROMPT_COLUMN,
    condition_size,
    path_below,
    resized_pixels,
    shows_the_same,
    target_columns,
    target_paths,
)
from .sample import Sample
from .tasks import TASKS, Task, UnreadableRecordError, images_of, videos_of, visuals_of
from .turns import one_conversation


MAX_CHARACTERS = 32_768  # of one record (our choice): a longer one would not fit a step's memory, today and on resume
MAX_IMAGES = 16  # of one record, clips included (our choice)
NOUNS, NAMES = (
    {"image": "image", "video": "clip"},
    {"image": "an image", "video": "a clip"},
)  # in what is said of a record


@contextmanager
def one_record() -> Iterator[None]:
    """Turns every error in reading a record into `UnreadableRecordError`: data can be wrong in ways that nobody foresaw."""
    try:
        yield
    except (UnreadableRecordError, StaleLatentsError):
        raise
    except OSError as error:
        raise UnreadableRecordError(f"a file that cannot be read ({error.strerror})") from error
    except Exception as error:
        raise UnreadableRecordError(f"a record of another form ({type(error).__name__})") from error


class RecordReader:
    """Records of one data set to samples, and to images alone. Every error is an `UnreadableRecordError`.

    Args:
        image_root: the folder that image paths are relative to.
        latents: those of the images, by the number of their record; images are then not decoded.
        video_processor: None for a model that only reads images.
        targets, prompts, condition_image_size: for painted images, as in `Source`; prompts are the texts themselves.
    """

    def __init__(
        self,
        columns: Columns,
        image_root: Path,
        image_processor: HydraImageProcessor,
        latents: StoredLatents | None = None,
        *,
        targets: Path | None = None,
        prompts: tuple[str, ...] = (),
        condition_image_size: int | None = None,
        video_processor: HydraVideoProcessor | None = None,
    ):
        self.columns, self.image_root, self.image_processor = columns, image_root, image_processor
        self.video_processor = video_processor
        self.latents = latents
        self.targets, self.prompts, self.condition_image_size = targets, prompts, condition_image_size
        for processor in filter(None, (image_processor, video_processor)):
            processor.check_plain()

    def sample(self, record: dict, task: str, rng: random.Random | None = None, number: int | None = None) -> Sample:
        """The sample of a record. `rng` chooses one of several captions, instructions, edits or parts of a dialogue, the first
        without it; `number` finds stored latents.

        Raises `StaleLatentsError` if the record's images are not those that the latents were made of.
        """
        with one_record():
            row = TASKS[task]
            messages = row.read(self, self._with_one_text(record, rng))
            if row.links_source:
                messages = one_edit(messages, rng)
            elif row.splits_turns:
                messages = one_conversation(messages, rng)
            parts = [part for message in messages for part in message["content"]]
            _check_texts([part["text"] for part in parts if part["type"] == "text"])
            if self.latents is not None:
                self.latents.check_unchanged(number, self.files(record, task))
                for part, (grid, mean) in zip(images_of(messages), self.latents[number], strict=True):
                    part |= {"image": grid, "latent_mean": mean}
            elif row.paint is not None:
                self._paint(messages, record, row)
            elif row.links_source:
                self._load_edit(messages)
            else:
                self._load(messages)
            return Sample(task=task, messages=messages)

    def files(self, record: dict, task: str) -> list[Path]:
        """The files of the images, and of what is painted, that the record names."""
        row = TASKS[task]
        images = images_of(row.read(self, self._with_one_text(record, None)))
        values = [part["image"] for part in images] + ([self._target(record, row.target)] if row.target else [])
        return [path for value in values if (path := self._path(value)) is not None]

    def _load(self, messages: list[dict]) -> None:
        """Replaces undecoded images and clips with their pixels."""
        for message in messages:
            is_generated = message["role"] == "assistant"
            for part in visuals_of([message]):
                if part["type"] == "video":
                    part["video"] = self.clip(part["video"], is_generated)
                else:
                    part["image"] = (self.generated_image if is_generated else self.given_image)(part["image"])

    def image(self, record: dict) -> Tensor:
        """The record's first image (3, H, W) in [-1, 1]: its middle part, in the size of images to be generated."""
        with one_record():
            images = self.images(record)
            if not images:
                raise UnreadableRecordError("no image")
            return as_pixel_values(self.generated_image(images[0]))

    # Captions

    def generation(self, record: dict, kind: str = "image") -> list[dict]:
        """The caption as the user's turn, the image or clip as the assistant's."""
        caption = text_part(self._caption(record))
        return [
            {"role": "user", "content": [caption]},
            {"role": "assistant", "content": [self._only_part(record, kind)]},
        ]

    def description(self, record: dict, question: str, kind: str = "image") -> list[dict]:
        """A question about the image or clip, with the caption as its answer."""
        asked = [self._only_part(record, kind), text_part(question)]
        return [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [text_part(self._caption(record))]},
        ]

    def _with_one_text(self, record: dict, rng: random.Random | None) -> dict:
        """The record with one of several captions, and of several instructions."""
        chosen = {}
        for column in dict.fromkeys((self.columns.caption, self.columns.instruction)):
            if isinstance(value := record.get(column), list):
                texts = [text for text in value if isinstance(text, str) and text.strip()]
                chosen[column] = texts[0] if texts and rng is None else rng.choice(texts) if texts else None
        return record | chosen

    def _caption(self, record: dict) -> str:
        caption = record.get(self.columns.caption)
        if self.columns.class_names:
            caption = dict(enumerate(self.columns.class_names)).get(caption, "").replace("_", " ")
        if caption is not None and not isinstance(caption, str):
            raise UnreadableRecordError(
                f"a caption of type {type(caption).__name__}, expected a text or a list of them"
            )
        if caption is None or not caption.strip():
            raise UnreadableRecordError("no caption")
        return caption.strip()

    # Conversations

    def conversation(self, record: dict, may_draw: bool = False) -> list[dict]:
        """The turns of a chat, with its images and clips in their places; the assistant has some only if it `may_draw`."""
        turns = record.get(self.columns.chat)
        if not isinstance(turns, list) or not turns:
            raise UnreadableRecordError("no turns")
        videos = self.videos(record)
        placeholders = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) if videos else (IMAGE_PLACEHOLDER,)
        messages = [read_turn(turn, placeholders) for turn in turns]
        if not any(message["role"] == "assistant" for message in messages):
            raise UnreadableRecordError("no turn of an assistant")
        if not may_draw and visuals_of([message for message in messages if message["role"] != "user"]):
            raise UnreadableRecordError("an image outside the user's turns")
        if len(visuals_of(messages)) > MAX_IMAGES:
            raise UnreadableRecordError(f"more than {MAX_IMAGES} images")
        images = self.images(record)
        if videos and not images:  # LLaVA-Video writes <image> for its clips
            for part in [part for part in images_of(messages) if part["image"] is None]:
                del part["image"]
                part |= open_part("video")
        _fill(images_of(messages), "image", images)
        _fill(videos_of(messages), "video", videos)
        return messages

    # Edits

    def edit(self, record: dict) -> list[dict]:
        """The source images and the instruction, then the edited image: by columns, or as a dialogue of several edits."""
        if not self.columns.has_edit:
            return self.conversation(record, may_draw=True)
        sources, targets = (
            [{"type": "image", "image": value} for value in _values(record, (column,))]
            for column in (self.columns.source, self.columns.target)
        )
        if len(sources) >= MAX_IMAGES:
            raise UnreadableRecordError(f"more than {MAX_IMAGES} images")
        instruction = record.get(self.columns.instruction)
        if not isinstance(instruction, str | None):
            raise UnreadableRecordError(
                f"an instruction of type {type(instruction).__name__}, expected a text or a list"
            )
        asked = [*sources, text_part((instruction or "").strip())]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": targets}]

    def _load_edit(self, messages: list[dict]) -> None:
        """Replaces undecoded images with their pixels. The last source gets the size of the target, and the same part of it is
        used; others are seen whole."""
        *others, source, target = images_of(messages)
        images = [self._decode(source["image"], "a source image"), self._decode(target["image"], "a target image")]
        check_same_aspect(*images)
        size = self.image_processor.generated_size(images[1].height, images[1].width)
        for part, image in zip((source, target), images):
            part["image"] = _pixels_of(self.image_processor.generated_levels(image, size))
        for part in others:
            part["image"] = self.given_image(part["image"])

    # Painted images

    def painting(self, record: dict) -> list[dict]:
        """The user's turn is the record's prompt, or the first one, and the image; the assistant's is an empty place for what
        is painted."""
        image = {"type": "image", "image": self._one_image(record)}
        painted = {"role": "assistant", "content": [{"type": "image", "image": None}]}
        prompt = record[PROMPT_COLUMN] if PROMPT_COLUMN in record else self.prompts[0]
        return [{"role": "user", "content": [text_part(prompt), image]}, painted]

    def _paint(self, messages: list[dict], record: dict, task: Task) -> None:
        """Fills in the pixels of the given image and of its target: the same part of both."""
        given, painted = images_of(messages)
        image = target = self._decode(given["image"], "an image")
        if task.target:
            target = self._decode(self._target(record, task.target), "a target")
            if not shows_the_same(image, target):
                raise UnreadableRecordError("a target of another aspect than its image")
        height, width = self.image_processor.generated_size(image.height, image.width)
        size = condition_size(height, width, self.image_processor.patch_size, self.condition_image_size)
        given["image"] = resized_pixels(center_crop(image, height, width), *size, self.image_processor)
        painted["image"] = task.paint(target, height, width, self.image_processor)

    def _target(self, record: dict, name: str) -> bytes | str | dict:
        """The target of the record's image, undecoded."""
        if self.targets is None:
            values = [record[column] for column in target_columns(name) if record.get(column)]
            if not values:
                raise UnreadableRecordError("no target")
            return values[0]
        path = path_below(self._one_image(record), self.image_root)
        files = [self.targets / target for target in target_paths(path or "")]
        found = [str(file.absolute()) for file in files if path and file.is_file()]
        if not found:
            raise UnreadableRecordError("a target that is not there")
        return found[0]

    def _decode(self, value: bytes | str | dict, what: str) -> Image.Image:
        """Bytes, a path or `{"bytes", "path"}` to an upright image."""
        try:
            image = Image.open(self._open(value))
            check_image_size(image.height, image.width, self.image_processor.max_input_pixels)
            image.load()
            return ImageOps.exif_transpose(image)
        except UnreadableRecordError:
            raise
        except Exception as error:  # decoders raise nearly anything for damaged files
            raise UnreadableRecordError(f"{what} that cannot be decoded") from error

    # Images

    def images(self, record: dict) -> list:
        """The images in the record's first image column that is not empty, undecoded."""
        return _values(record, self.columns.images)

    def videos(self, record: dict) -> list:
        """The clips in the record's first column of clips that is not empty, undecoded."""
        return _values(record, self.columns.videos)

    def _only_part(self, record: dict, kind: str) -> dict:
        """The record's one image or clip as a part of a message."""
        values = self.videos(record) if kind == "video" else self.images(record)
        if len(values) != 1:
            raise UnreadableRecordError(f"more than one {NOUNS[kind]}" if values else f"no {NOUNS[kind]}")
        return {"type": kind, kind: values[0]}

    def _one_image(self, record: dict):
        return self._only_part(record, "image")["image"]

    def given_image(self, value: bytes | str | dict) -> Tensor:
        """Bytes, a path or `{"bytes", "path"}` to the whole image (3, H, W): uint8 levels, or float pixels, see `Sample`."""
        return self._pixels(value, lambda file: self.image_processor.given_levels(Image.open(file)))

    def generated_image(self, value: bytes | str | dict) -> Tensor:
        """Like `given_image`, but the middle part in the nearest aspect ratio."""
        return self._pixels(value, lambda file: self.image_processor.generated_levels(Image.open(file)))

    def clip(self, value: bytes | str | dict, is_generated: bool = False) -> Tensor:
        """Bytes, a path or `{"bytes", "path"}` to the frames that the video processor takes, (3, T, H, W) in uint8: whole, or if
        they are generated, their middle part in the nearest aspect ratio."""
        processor = self.video_processor
        levels = self._pixels(value, processor.generated_levels if is_generated else processor.given_levels, "video")
        if levels.shape[1] == 1:
            raise UnreadableRecordError("a clip that is too short: it gives one frame")
        return levels

    def _pixels(
        self, value: bytes | str | dict, levels_of: Callable[[BytesIO | Path], Tensor], kind: str = "image"
    ) -> Tensor:
        try:
            return _pixels_of(levels_of(self._open(value, kind)))
        except UnreadableRecordError:
            raise
        except Exception as error:  # decoders raise nearly anything for damaged files
            raise UnreadableRecordError(f"{NAMES[kind]} that cannot be decoded") from error

    def _path(self, value: bytes | str | dict | None) -> Path | None:
        """The file of an image, None for one that is not in a file of its own."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str) or value.startswith("data:") or "://" in value:
            return None
        return self.image_root / value

    def _open(self, value: bytes | str | dict, kind: str = "image") -> BytesIO | Path:
        if (path := self._path(value)) is not None:
            if not (path.is_file() or (kind == "video" and path.is_dir())):  # a folder of frames
                raise UnreadableRecordError(f"{NAMES[kind]} file that is not there")
            return path
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return BytesIO(value)
        if not isinstance(value, str) or value.startswith(("http://", "https://")):
            raise UnreadableRecordError(f"{NAMES[kind]} that is neither bytes nor a path")
        if value.startswith("data:"):
            return BytesIO(base64.decodebytes(value.rpartition(",")[2].encode()))
        if (file := _fetch(value)) is None:
            raise UnreadableRecordError(f"{NAMES[kind]} file that is not there")
        return file


def _fetch(url: str) -> BytesIO | None:
    """A file on the Hub or in an archive, by the name that `datasets` gives it; None if there is none."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return BytesIO(file.read())
    except (OSError, KeyError):  # KeyError: no such member of an archive
        return None


def _pixels_of(levels: Tensor) -> Tensor:
    """Levels in uint8 as they are, those with fractions as pixels in [-1, 1]."""
    return levels if levels.dtype == torch.uint8 else normalize_levels(levels)


def _values(record: dict, columns: tuple[str, ...]) -> list:
    """What is in the first of some columns that is not empty, undecoded."""
    values = [record[name] for name in columns if record.get(name) not in (None, "", b"", [])]
    if not values:
        return []
    value = list_in(values[0], start="[")  # written so by `datasets` when the column began with single paths
    return value if isinstance(value, list) else [value]


def _fill(parts: list[dict], kind: str, values: list) -> None:
    """Puts the record's images or clips into the places that are open for them."""
    places = [part for part in parts if part[kind] is None]
    if len(places) != len(values):
        raise UnreadableRecordError(f"not as many {NOUNS[kind]}s as placeholders")
    for part, value in zip(places, values):
        part[kind] = value


def _check_texts(texts: list[str]) -> None:
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise UnreadableRecordError(f"more than {MAX_CHARACTERS} characters")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UnreadableRecordError("text with half a character (a lone surrogate)") from error
