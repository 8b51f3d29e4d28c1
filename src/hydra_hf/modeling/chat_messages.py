"""The messages of a chat: parts of text, images and clips, and checks of them."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from PIL import Image


PART_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}  # in their order


def check_unicode(name: str, text: str) -> None:
    """Raises ValueError for text with half a character (a lone surrogate), which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Got {name}={text!r:.100}, expected valid Unicode: character {error.start} is half of one, or a byte that is"
            " not UTF-8."
        ) from error


@lru_cache
def token_starts(tokens: tuple[str, ...]) -> re.Pattern:
    """Matches the first character of each of `tokens` in a text, overlapping ones too."""
    return re.compile(f"(?={'|'.join(map(re.escape, tokens))}).", flags=re.DOTALL)


def as_dicts(value: Any) -> Any:
    """Messages and their parts as dicts, if they are objects of an API client: dataclasses or pydantic models."""
    if isinstance(value, (list, tuple)):
        return [as_dicts(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        value = value.model_dump()
    if isinstance(value, dict) and isinstance(value.get("content"), (list, tuple)):
        return {**value, "content": as_dicts(value["content"])}
    return value


def parts_of(conversations: list[list[dict]], *kinds: str) -> Iterator[dict]:
    """The parts of some kinds, in order."""
    for messages in conversations:
        for message in messages:
            if not isinstance(message["content"], str):
                yield from (part for part in message["content"] if part["type"] in kinds)


def check_parts(conversations: list[list[dict]], kind: str) -> None:
    """Raises ValueError for a part without its image or clip."""
    keys = PART_KEYS[kind]
    if any(not any(part.get(key) is not None for key in keys) for part in parts_of(conversations, kind)):
        raise ValueError(f"Got a part of type {kind!r} without its {kind}, expected one of the keys {keys}.")


def check_placeholders(texts: list[str], token: str, count: int | None, what: str) -> None:
    """Raises ValueError unless there are as many placeholders as images or clips; transformers checks this itself since 5.23."""
    num_placeholders = sum(text.count(token) for text in texts)
    if count is None and num_placeholders:
        raise ValueError(f"Got {num_placeholders} {token} tokens, but no {what} were passed.")
    if count is not None and count != num_placeholders:
        raise ValueError(
            f"Got {num_placeholders} {token} tokens and {count} {what}: the number of {token} tokens in the prompts should"
            f" be the same as the number of {what}."
        )


class AnswerParts(list):
    """The parts of an answer, the `content` of an assistant's message."""

    def find(self, prompt: str) -> int:
        """-1: transformers' pipelines look for the text of the prompt at the start of what was generated, to cut it off."""
        return -1


def answer_parts(
    token_ids: Sequence[int], images: Sequence[Image.Image], image_token_id: int, decode: Callable[[list[int]], str]
) -> AnswerParts:
    """An answer's text and images, in order; each run of placeholders in `token_ids` is the next image."""
    parts, remaining = AnswerParts(), iter(images)
    for is_image, run in groupby(token_ids, key=lambda token: token == image_token_id):
        if is_image:
            parts.append({"type": "image", "image": next(remaining)})
        elif text := decode(list(run)):
            parts.append({"type": "text", "text": text})
    return parts
