"""Chat messages and the parts that they consist of."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any


PART_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}  # in their order


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


def parts_of(conversations: list[list[dict]], kind: str) -> Iterator[dict]:
    """The parts of one kind, "text", "image" or "video", in order."""
    for messages in conversations:
        for message in messages:
            if not isinstance(message["content"], str):
                yield from (part for part in message["content"] if part["type"] == kind)


def check_parts(conversations: list[list[dict]], kind: str) -> None:
    """Raises ValueError for a part without its image or clip."""
    keys = PART_KEYS[kind]
    if any(not any(part.get(key) is not None for key in keys) for part in parts_of(conversations, kind)):
        raise ValueError(f"Got a part of type {kind!r} without its {kind}, expected one of the keys {keys}.")
