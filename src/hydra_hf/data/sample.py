"""One training sample of any task: a chat. Images in a user's turn are given, in an assistant's turn generated."""

from dataclasses import dataclass

from .tasks import check_task


@dataclass(frozen=True, kw_only=True)
class Sample:
    """`messages` as the chat template takes them; an image part holds pixels (3, H, W) in [-1, 1]."""

    task: str
    messages: list[dict]

    def __post_init__(self):
        check_task(self.task, "A sample")
