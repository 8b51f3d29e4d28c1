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
    from .columns import Columns
    from .records import RecordReader

DESCRIBE = "Describe the image."  # our choice: the question whose answer is a caption
DESCRIBE_VIDEO = "Describe the video."  # our choice, the same for clips


class UnreadableRecordError(Exception):
    """A record that is skipped; the text is the reason, the same for all records with the same fault."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table.

    Args:
        user, assistant: the parts of a sample of one turn, each "text", "image" or "video".
        fits: whether records with these columns can become samples.
        read: the messages of a record, images and clips undecoded. Raises `UnreadableRecordError`.
        drops_prompt: whether a share of the prompts is replaced by the empty one, for guidance; half of these keep their given
            images, if they have any.
        links_source: whether a generated image interacts inside Sem-ViT with the given image directly before it, which has its
            size (HYDRA-X, section 3: source-target interaction).
        splits_turns: whether a record is a dialogue of which a sample is one part, see `data.turns`: some parts end with a generated
            image, and in one of them every image is given.
        paint: makes the pixels of a generated image that shows the given one; the same part of both is used. None where the
            generated image does not depend on a given one.
        target: what is painted: a column of a record, or a folder that `hydra prepare unimrg` makes. "" is the image itself.
    """

    user: tuple[str, ...]
    assistant: tuple[str, ...]
    fits: "Callable[[Columns], bool]"
    read: "Callable[[RecordReader, dict], list[dict]]"
    drops_prompt: bool = False
    links_source: bool = False
    splits_turns: bool = False
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

    @property
    def num_videos(self) -> int:
        """The number of clips in a sample of one turn."""
        return (self.user + self.assistant).count("video")

    @property
    def keeps_latents(self) -> bool:
        """Whether latents of the task's images can be encoded once and kept: not of clips, and not of a dialogue's, of which each
        epoch may choose another turn."""
        return bool(self.num_images) and not (self.num_videos or self.links_source or self.splits_turns)

    def blank_messages(self, image: Tensor) -> list[dict]:
        """Placeholder messages in the form of the task, with `image` (3, H, W), or a clip of this one frame, wherever it has one."""
        parts = {
            "text": {"type": "text", "text": DESCRIBE},
            "image": {"type": "image", "image": image},
            "video": {"type": "video", "video": image[:, None]},
        }
        return [
            {"role": role, "content": [parts[kind] for kind in getattr(self, role)]} for role in ("user", "assistant")
        ]


def images_of(messages: list[dict]) -> list[dict]:
    """The image parts of messages, in order."""
    return [part for part in visuals_of(messages) if part["type"] == "image"]


def videos_of(messages: list[dict]) -> list[dict]:
    """The parts of messages that are clips, in order."""
    return [part for part in visuals_of(messages) if part["type"] == "video"]


def visuals_of(messages: list[dict]) -> list[dict]:
    """The parts of messages that are images or clips, in order."""
    return [part for message in messages for part in message["content"] if part["type"] in ("image", "video")]


def read_text(reader: "RecordReader", record: dict) -> list[dict]:
    """A chat without images."""
    messages = reader.conversation(record)
    if visuals_of(messages):
        raise UnreadableRecordError("images in a sample of text")
    return messages


def read_understanding(reader: "RecordReader", record: dict) -> list[dict]:
    """A chat about images, or a caption as the answer to `DESCRIBE`."""
    messages = reader.conversation(record) if reader.columns.chat else reader.description(record, DESCRIBE)
    if videos_of(messages):
        raise UnreadableRecordError("a clip in a sample of images")
    if not images_of(messages):
        raise UnreadableRecordError("no image")
    return messages


def read_video_understanding(reader: "RecordReader", record: dict) -> list[dict]:
    """A chat about clips, and images if it has some, or a caption as the answer to `DESCRIBE_VIDEO`."""
    is_chat = bool(reader.columns.chat)
    messages = reader.conversation(record) if is_chat else reader.description(record, DESCRIBE_VIDEO, "video")
    if not videos_of(messages):
        raise UnreadableRecordError("no clip")
    return messages


def read_video_generation(reader: "RecordReader", record: dict) -> list[dict]:
    """A clip after its caption."""
    return reader.generation(record, "video")


def read_edit(reader: "RecordReader", record: dict) -> list[dict]:
    """Source images with an instruction, and what it makes of the last of them; or a dialogue of such turns."""
    messages = reader.edit(record)
    if videos_of(messages):
        raise UnreadableRecordError("a clip in a sample of images")
    return messages


def read_interleaved(reader: "RecordReader", record: dict) -> list[dict]:
    """A dialogue in which the assistant writes and draws."""
    messages = reader.conversation(record, may_draw=True)
    if videos_of(messages):
        raise UnreadableRecordError("a clip in a sample of images")
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
    "edit": Task(
        user=("image", "text"), assistant=("image",), drops_prompt=True, links_source=True,
        fits=lambda columns: columns.has_edit or bool(columns.chat), read=read_edit,
    ),
    "video_understand": Task(
        user=("video", "text"), assistant=("text",),
        fits=lambda columns: bool(columns.chat) or columns.has_video_caption, read=read_video_understanding,
    ),
    "video_generate": Task(
        user=("text",), assistant=("video",), drops_prompt=True,
        fits=lambda columns: columns.has_video_caption, read=read_video_generation,
    ),
    "interleave": Task(
        user=("text",), assistant=("text", "image"), splits_turns=True,
        fits=lambda columns: bool(columns.chat), read=read_interleaved,
    ),
}  # fmt: skip


def task_number(name: str) -> int:
    """The row of a task in the table."""
    return list(TASKS).index(name)


def check_task(name: str, where: str) -> None:
    """Raises ValueError for a name that is not a task."""
    if name not in TASKS:
        raise ValueError(f"{where} has task={name!r}, expected one of {list(TASKS)}.")
