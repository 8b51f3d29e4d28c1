"""The table of tasks: everything that follows from a task's name. A new task is a row here and a function that reads its records.

Images of the user are given, images of the assistant are generated; text of the assistant is scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from hydra_hf.modeling import HydraImageProcessor

from .painting import boundary_pixels, depth_pixels, picture_pixels


if TYPE_CHECKING:
    from .records import Columns, RecordReader

DESCRIBE = "Describe the image."  # our choice: the question whose answer is a caption


class UnreadableRecordError(Exception):
    """A record that is skipped; the text is the reason, the same for all records with the same fault."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table.

    Args:
        user, assistant: the parts of a sample of one turn, each "text", "image" or "video".
        fits: whether records with these columns can become samples; None where data sets are not read yet.
        read: the messages of a record, images undecoded. Raises `UnreadableRecordError`.
        drops_prompt: whether a share of the prompts is replaced by the empty one, for guidance.
        paint: makes the pixels of a generated image that shows the given one; the same part of both is used. None where the
            generated image does not depend on a given one.
        target: what is painted: a column of a record, or a folder that `hydra prepare unimrg` makes. "" is the image itself.
    """

    user: tuple[str, ...]
    assistant: tuple[str, ...]
    fits: "Callable[[Columns], bool] | None" = None
    read: "Callable[[RecordReader, dict], list[dict]] | None" = None
    drops_prompt: bool = False
    paint: Callable[[Image.Image, int, int, HydraImageProcessor], Tensor] | None = None
    target: str = ""

    @property
    def generates(self) -> bool:
        """Whether the assistant's turn holds an image, scored by the flow loss."""
        return bool({"image", "video"} & set(self.assistant))

    @property
    def scores_text(self) -> bool:
        """Whether the assistant's turn holds text, scored by the language loss."""
        return "text" in self.assistant

    @property
    def num_images(self) -> int:
        """The number of images in a sample of one turn."""
        return (self.user + self.assistant).count("image")

    def blank_messages(self, image: Tensor) -> list[dict]:
        """Placeholder messages in the form of the task, with `image` (3, H, W) wherever it has one."""
        parts = {"text": {"type": "text", "text": DESCRIBE}, "image": {"type": "image", "image": image}}
        return [
            {"role": role, "content": [parts[kind] for kind in getattr(self, role)]} for role in ("user", "assistant")
        ]


def images_of(messages: list[dict]) -> list[dict]:
    """The image parts of messages, in order."""
    return [part for message in messages for part in message["content"] if part["type"] == "image"]


def read_text(reader: "RecordReader", record: dict) -> list[dict]:
    """A chat without images."""
    messages = reader.conversation(record)
    if images_of(messages):
        raise UnreadableRecordError("images in a sample of text")
    return messages


def read_understanding(reader: "RecordReader", record: dict) -> list[dict]:
    """A chat about images, or a caption as the answer to `DESCRIBE`."""
    messages = reader.conversation(record) if reader.columns.chat else reader.description(record, DESCRIBE)
    if not images_of(messages):
        raise UnreadableRecordError("no image")
    return messages


def read_generation(reader: "RecordReader", record: dict) -> list[dict]:
    """An image after its caption."""
    return reader.generation(record)


def read_painting(reader: "RecordReader", record: dict) -> list[dict]:
    """A prompt and an image, in this order (see `pipelines.painting`), then what is painted of it."""
    return reader.painting(record)


TASKS = {  # the order numbers the tasks for the seeds of their noise: new rows go to the end
    "text": Task(user=("text",), assistant=("text",), fits=lambda columns: bool(columns.chat), read=read_text),
    "understand": Task(
        user=("image", "text"), assistant=("text",),
        fits=lambda columns: bool(columns.chat) or columns.has_caption, read=read_understanding,
    ),
    "generate": Task(
        user=("text",), assistant=("image",), drops_prompt=True,
        fits=lambda columns: columns.has_caption, read=read_generation,
    ),
    "reconstruct": Task(
        user=("text", "image"), assistant=("image",), paint=picture_pixels,
        fits=lambda columns: bool(columns.images), read=read_painting,
    ),
    "depth": Task(
        user=("text", "image"), assistant=("image",), paint=depth_pixels, target="depth",
        fits=lambda columns: bool(columns.images), read=read_painting,
    ),
    "segment": Task(
        user=("text", "image"), assistant=("image",), paint=boundary_pixels, target="segment",
        fits=lambda columns: bool(columns.images), read=read_painting,
    ),
    "edit": Task(user=("image", "text"), assistant=("image",)),
    "video_understand": Task(user=("video", "text"), assistant=("text",)),
    "video_generate": Task(user=("text",), assistant=("video",)),
}  # fmt: skip


def task_number(name: str) -> int:
    """The row of a task in the table."""
    return list(TASKS).index(name)


def check_task(name: str, where: str) -> None:
    """Raises ValueError for a name that is not a task."""
    if name not in TASKS:
        raise ValueError(f"{where} has task={name!r}, expected one of {list(TASKS)}.")
