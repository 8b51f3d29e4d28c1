"""Records of data sets to samples: which column holds what, and what is wrong with a record."""

import base64
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from hydra_hf.modeling import HydraImageProcessor
from hydra_hf.modeling.image_processing_hydra import as_pixel_values, center_crop, check_image_size, normalize_levels

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
from .tasks import TASKS, Task, UnreadableRecordError, images_of


IMAGE_COLUMNS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "image",
    "images",
)  # the first one that is not empty counts
CAPTION_COLUMNS = ("txt", "caption", "captions", "text")
CHAT_COLUMNS = ("messages", "conversations")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_PLACEHOLDER = "<image>"
MAX_CHARACTERS = 32_768  # of one record (our choice): a longer one would not fit a step's memory, today and on resume
MAX_IMAGES = 16  # of one record (our choice)


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what.

    Args:
        names: all columns.
        images: columns that may hold an image or a list of them.
        chat: column of the turns, "" if there is none.
        caption: column of the caption, "" if there is none.
        class_names: captions by class number, when `caption` is "label".
    """

    names: tuple[str, ...]
    images: tuple[str, ...] = ()
    chat: str = ""
    caption: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def has_caption(self) -> bool:
        """Whether an image may come with a caption."""
        return bool(self.images and self.caption)

    def __str__(self) -> str:
        used = {"images": self.images, "chats": self.chat, "captions": self.caption}
        found = ", ".join(f"{what} in {column!r}" for what, column in used.items() if column)
        unused = [name for name in self.names if name not in (*self.images, self.chat, self.caption)]
        return f"{found}; not used: {unused}" if unused else found


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


def find_columns(names: set[str], class_names: tuple[str, ...]) -> Columns:
    """The columns that are recognised; class names serve as captions only if there are no others."""
    images = tuple(name for name in IMAGE_COLUMNS if name in names)
    chat = next((name for name in CHAT_COLUMNS if name in names), "")
    caption = next((name for name in CAPTION_COLUMNS if name in names), "")
    is_class_only = bool(class_names) and not (caption or chat)
    return Columns(
        names=tuple(sorted(names)),
        images=images,
        chat=chat,
        caption="label" if is_class_only else caption,
        class_names=class_names if is_class_only else (),
    )


class RecordReader:
    """Records of one data set to samples, and to images alone. Every error is an `UnreadableRecordError`.

    Args:
        image_root: the folder that image paths are relative to.
        latents: those of the images, by the number of their record; images are then not decoded.
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
    ):
        self.columns, self.image_root, self.image_processor = columns, image_root, image_processor
        self.latents = latents
        self.targets, self.prompts, self.condition_image_size = targets, prompts, condition_image_size
        image_processor.check_plain()

    def sample(self, record: dict, task: str, rng: random.Random | None = None, number: int | None = None) -> Sample:
        """The sample of a record. `rng` chooses one of several captions, the first without it; `number` finds stored latents.

        Raises `StaleLatentsError` if the record's images are not those that the latents were made of.
        """
        with one_record():
            row = TASKS[task]
            messages = row.read(self, self._with_one_caption(record, rng))
            parts = [part for message in messages for part in message["content"]]
            _check_texts([part["text"] for part in parts if part["type"] == "text"])
            if self.latents is not None:
                self.latents.check_unchanged(number, self.files(record, task))
                for part, (grid, mean) in zip(images_of(messages), self.latents[number], strict=True):
                    part |= {"image": grid, "latent_mean": mean}
            elif row.paint is not None:
                self._paint(messages, record, row)
            else:
                self._load(messages)
            return Sample(task=task, messages=messages)

    def files(self, record: dict, task: str) -> list[Path]:
        """The files of the images, and of what is painted, that the record names."""
        row = TASKS[task]
        images = images_of(row.read(self, self._with_one_caption(record, None)))
        values = [part["image"] for part in images] + ([self._target(record, row.target)] if row.target else [])
        return [path for value in values if (path := self._path(value)) is not None]

    def _load(self, messages: list[dict]) -> None:
        """Replaces undecoded images with their pixels."""
        for message in messages:
            pixels_of = self.generated_image if message["role"] == "assistant" else self.given_image
            for part in images_of([message]):
                part["image"] = pixels_of(part["image"])

    def image(self, record: dict) -> Tensor:
        """The record's first image (3, H, W) in [-1, 1]: its middle part, in the size of images to be generated."""
        with one_record():
            images = self.images(record)
            if not images:
                raise UnreadableRecordError("no image")
            return as_pixel_values(self.generated_image(images[0]))

    # Captions

    def generation(self, record: dict) -> list[dict]:
        """The caption as the user's turn, the image as the assistant's."""
        caption = self._caption(record)
        image = {"type": "image", "image": self._one_image(record)}
        return [{"role": "user", "content": [_text(caption)]}, {"role": "assistant", "content": [image]}]

    def description(self, record: dict, question: str) -> list[dict]:
        """A question about the image, with the caption as its answer."""
        image = {"type": "image", "image": self._one_image(record)}
        answer = {"role": "assistant", "content": [_text(self._caption(record))]}
        return [{"role": "user", "content": [image, _text(question)]}, answer]

    def _with_one_caption(self, record: dict, rng: random.Random | None) -> dict:
        captions = record.get(self.columns.caption)
        if not isinstance(captions, list):
            return record
        texts = [text for text in captions if isinstance(text, str) and text.strip()]
        chosen = texts[0] if texts and rng is None else rng.choice(texts) if texts else None
        return record | {self.columns.caption: chosen}

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

    def conversation(self, record: dict) -> list[dict]:
        """The turns of a chat, with its images in their places."""
        turns = record.get(self.columns.chat)
        if not isinstance(turns, list) or not turns:
            raise UnreadableRecordError("no turns")
        messages = [_message(turn) for turn in turns]
        if not any(message["role"] == "assistant" for message in messages):
            raise UnreadableRecordError("no turn of an assistant")
        places = [(message["role"], part) for message in messages for part in message["content"] if "image" in part]
        if any(role != "user" for role, _ in places):
            raise UnreadableRecordError("an image outside the user's turns")
        if len(places) > MAX_IMAGES:
            raise UnreadableRecordError(f"more than {MAX_IMAGES} images")
        open_places = [part for _, part in places if part["image"] is None]
        images = self.images(record)
        if len(open_places) != len(images):
            raise UnreadableRecordError("not as many images as placeholders")
        for part, image in zip(open_places, images):
            part["image"] = image
        return messages

    # Painted images

    def painting(self, record: dict) -> list[dict]:
        """The user's turn is the record's prompt, or the first one, and the image; the assistant's is an empty place for what
        is painted."""
        image = {"type": "image", "image": self._one_image(record)}
        painted = {"role": "assistant", "content": [{"type": "image", "image": None}]}
        prompt = record[PROMPT_COLUMN] if PROMPT_COLUMN in record else self.prompts[0]
        return [{"role": "user", "content": [_text(prompt), image]}, painted]

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
        values = [record[name] for name in self.columns.images if record.get(name) not in (None, "", b"", [])]
        if not values:
            return []
        value = _list_in(values[0], start="[")  # written so by `datasets` when the column began with single paths
        return value if isinstance(value, list) else [value]

    def _one_image(self, record: dict):
        images = self.images(record)
        if len(images) != 1:
            raise UnreadableRecordError("no image" if not images else "more than one image")
        return images[0]

    def given_image(self, value: bytes | str | dict) -> Tensor:
        """Bytes, a path or `{"bytes", "path"}` to the whole image (3, H, W): uint8 levels, or float pixels, see `Sample`."""
        return self._pixels(value, self.image_processor.given_levels)

    def generated_image(self, value: bytes | str | dict) -> Tensor:
        """Like `given_image`, but the middle part in the nearest aspect ratio."""
        return self._pixels(value, self.image_processor.generated_levels)

    def _pixels(self, value: bytes | str | dict, levels_of: Callable[[Image.Image], Tensor]) -> Tensor:
        try:
            levels = levels_of(Image.open(self._open(value)))
            return levels if levels.dtype == torch.uint8 else normalize_levels(levels)
        except UnreadableRecordError:
            raise
        except Exception as error:  # decoders raise nearly anything for damaged files
            raise UnreadableRecordError("an image that cannot be decoded") from error

    def _path(self, value: bytes | str | dict | None) -> Path | None:
        """The file of an image, None for one that is not in a file of its own."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, str) or value.startswith("data:") or "://" in value:
            return None
        return self.image_root / value

    def _open(self, value: bytes | str | dict) -> BytesIO | Path:
        if (path := self._path(value)) is not None:
            if not path.is_file():
                raise UnreadableRecordError("an image file that is not there")
            return path
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return BytesIO(value)
        if not isinstance(value, str) or value.startswith(("http://", "https://")):
            raise UnreadableRecordError("an image that is neither bytes nor a path")
        if value.startswith("data:"):
            return BytesIO(base64.decodebytes(value.rpartition(",")[2].encode()))
        return _fetch(value)


def _fetch(url: str) -> BytesIO:
    """A file on the Hub or in an archive, by the name that `datasets` gives it."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return BytesIO(file.read())
    except (OSError, KeyError) as error:  # KeyError: no such member of an archive
        raise UnreadableRecordError("an image file that is not there") from error


def _message(turn: dict) -> dict:
    """A turn of LLaVA's or of OpenAI's form as a message; images that the record holds elsewhere are None."""
    if not isinstance(turn, dict):
        raise UnreadableRecordError("a turn that is not a dict")
    name = turn.get("from") or turn.get("role")
    if not isinstance(name, str) or name not in ROLES:
        raise UnreadableRecordError("a turn that is neither the user's, the assistant's nor the system's")
    role = ROLES[name]
    content = _list_in(turn.get("value") or turn.get("content") or "", start='[{"type":')  # as above
    if not isinstance(content, str | list):
        raise UnreadableRecordError(f"a turn whose content is a {type(content).__name__}, expected text or parts")
    parts = []
    for part in [_text(content)] if isinstance(content, str) else content:
        if not isinstance(part, dict):
            raise UnreadableRecordError("a part that is not a dict")
        parts += _parts(part.get("text")) if part.get("type") == "text" else [_image_part(part)]
    if not parts:
        raise UnreadableRecordError("an empty turn")
    return {"role": role, "content": parts}


def _parts(text: str) -> list[dict]:
    """Text with placeholders as parts; blank space around them is dropped."""
    if not isinstance(text, str):
        raise UnreadableRecordError("a text part without text")
    parts = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        parts += [{"type": "image", "image": None}] if index else []
        parts += [_text(piece.strip())] if piece.strip() else []
    return parts


def _image_part(part: dict) -> dict:
    if part.get("type") not in ("image", "image_url"):
        raise UnreadableRecordError("a part that is neither text nor image")
    value = next((part[name] for name in ("image", "image_url", "url", "path") if part.get(name)), None)
    return {"type": "image", "image": value.get("url", value) if isinstance(value, dict) else value}


def _check_texts(texts: list[str]) -> None:
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise UnreadableRecordError(f"more than {MAX_CHARACTERS} characters")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UnreadableRecordError("text with half a character (a lone surrogate)") from error


def _list_in(value, start: str):
    """The list that a string encodes as JSON; anything else unchanged."""
    if isinstance(value, str) and value.startswith(start):
        try:
            return json.loads(value)
        except json.JSONDecodeError:  # a path or a text that happens to begin so
            return value
    return value


def _text(text: str) -> dict:
    return {"type": "text", "text": text}
