"""One training sample of any task: a chat. Images in a user's turn are given, in an assistant's turn generated."""

from dataclasses import dataclass


TASKS = (
    "text", "understand", "generate", "reconstruct", "depth", "segment", "edit", "video_understand", "video_generate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sample:
    """`messages` as the chat template takes them; an image part holds pixels (3, H, W) in [-1, 1]."""

    task: str
    messages: list[dict]

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} must be one of {TASKS}.")
