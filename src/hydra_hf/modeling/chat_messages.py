"""The messages of a chat: parts of text, images and clips, and checks of them."""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any


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
