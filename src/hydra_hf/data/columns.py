"""Which columns of a data set hold what, by the names that public data sets give them."""

from dataclasses import dataclass


IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_ENDINGS = ("mp4", "webm", "mkv", "mov", "avi")
# Of each, the first one that is not empty counts
IMAGE_COLUMNS = (*IMAGE_ENDINGS, "image", "images")
VIDEO_COLUMNS = (*VIDEO_ENDINGS, "gif", "video", "videos", "video_path")
# Of each, the first one that is there counts
CAPTION_COLUMNS = ("txt", "caption", "captions", "text")
CHAT_COLUMNS = ("messages", "conversations")
SOURCE_COLUMNS = (
    "source_image", "source_images", "source_img", "src_img", "input_image", "input_images", "input_img", "original_image",
    "image_file", "image", "images",
)  # fmt: skip
TARGET_COLUMNS = (
    "target_image",
    "target_img",
    "edited_image",
    "edited_img",
    "output_image",
    "output_img",
    "edited_file",
)
INSTRUCTION_COLUMNS = (
    "instruction", "edit_instruction", "editing_instruction", "edit instruction", "edit_prompt", "edited_prompt_list", "edit",
    "prompt", *CAPTION_COLUMNS,
)  # fmt: skip
SOURCE_MEMBERS, TARGET_MEMBERS = (
    ("source", "input", "original"),
    ("target", "output", "edited"),
)  # of tars: KEY.source.png


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what.

    Args:
        names: all columns.
        images: columns that may hold an image or a list of them.
        videos: columns that may hold a clip or a list of them.
        chat: column of the turns, "" if there is none.
        caption: column of the caption, "" if there is none.
        class_names: captions by class number, when `caption` is "label".
        source, target, instruction: columns of an edit, "" for each that is not there.
    """

    names: tuple[str, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    chat: str = ""
    caption: str = ""
    class_names: tuple[str, ...] = ()
    source: str = ""
    target: str = ""
    instruction: str = ""

    @property
    def has_caption(self) -> bool:
        """Whether an image may come with a caption."""
        return bool(self.images and self.caption)

    @property
    def has_video_caption(self) -> bool:
        """Whether a clip may come with a caption."""
        return bool(self.videos and self.caption)

    @property
    def has_edit(self) -> bool:
        """Whether a record may be an image, an instruction and the edited image."""
        return bool(self.source and self.target and self.instruction)

    def __str__(self) -> str:
        used = {"images": self.images, "clips": self.videos, "chats": self.chat, "captions": self.caption}
        if self.has_edit:
            used |= {"source images": self.source, "edited images": self.target, "instructions": self.instruction}
        found = ", ".join(f"{what} in {column!r}" for what, column in used.items() if column)
        taken = {name for column in used.values() for name in ([column] if isinstance(column, str) else column)}
        unused = [name for name in self.names if name not in taken]
        return f"{found}; not used: {unused}" if unused else found


def find_columns(names: set[str], class_names: tuple[str, ...]) -> Columns:
    """The columns that are recognised; class names serve as captions only if there are no others."""
    chat, caption = _first(CHAT_COLUMNS, names), _first(CAPTION_COLUMNS, names)
    is_class_only = bool(class_names) and not (caption or chat)
    return Columns(
        names=tuple(sorted(names)),
        images=tuple(name for name in IMAGE_COLUMNS if name in names),
        videos=tuple(name for name in VIDEO_COLUMNS if name in names),
        chat=chat,
        caption="label" if is_class_only else caption,
        class_names=class_names if is_class_only else (),
        source=_first((*_members(SOURCE_MEMBERS), *SOURCE_COLUMNS), names),
        target=_first((*_members(TARGET_MEMBERS), *TARGET_COLUMNS), names),
        instruction=_first(INSTRUCTION_COLUMNS, names),
    )


def _first(wanted: tuple[str, ...], names: set[str]) -> str:
    return next((name for name in wanted if name in names), "")


def _members(names: tuple[str, ...]) -> list[str]:
    """The names that a tar gives to images of these names, and those with `_image` behind them."""
    return [f"{name}{end}.{ending}" for name in names for end in ("", "_image") for ending in IMAGE_ENDINGS]


def by_kind(path: str) -> dict[str, str]:
    """The path in the column of images or of clips."""
    return {"video" if ends_in(path, VIDEO_ENDINGS) else "image": path}


def ends_in(path: str, endings: tuple[str, ...]) -> bool:
    return path.lower().endswith(tuple(f".{ending}" for ending in endings))
