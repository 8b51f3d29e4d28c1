"""Turns of data sets, in LLaVA's form or in OpenAI's, to messages whose images and clips are not decoded yet."""

import json
import re

from .tasks import UnreadableRecordError


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
PART_TYPES = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


def read_turn(turn: dict, placeholders: tuple[str, ...]) -> dict:
    """A turn as a message; images and clips that the record holds elsewhere are None.

    Args:
        placeholders: those of "<image>" and "<video>" that are not plain text in the turns.
    """
    if not isinstance(turn, dict):
        raise UnreadableRecordError("a turn that is not a dict")
    name = turn.get("from") or turn.get("role")
    if not isinstance(name, str) or name not in ROLES:
        raise UnreadableRecordError("a turn that is neither the user's, the assistant's nor the system's")
    content = list_in(
        turn.get("value") or turn.get("content") or "", start='[{"type":'
    )  # as `datasets` writes mixed columns
    if not isinstance(content, str | list):
        raise UnreadableRecordError(f"a turn whose content is a {type(content).__name__}, expected text or parts")
    parts = []
    for part in [text_part(content)] if isinstance(content, str) else content:
        if not isinstance(part, dict):
            raise UnreadableRecordError("a part that is not a dict")
        is_text = part.get("type") == "text"
        parts += _split(part.get("text"), placeholders) if is_text else [_visual_part(part)]
    if not parts:
        raise UnreadableRecordError("an empty turn")
    return {"role": ROLES[name], "content": parts}


def _split(text: str, placeholders: tuple[str, ...]) -> list[dict]:
    """Text with placeholders as parts; blank space around them is dropped."""
    if not isinstance(text, str):
        raise UnreadableRecordError("a text part without text")
    parts = []
    for piece in re.split(f"({'|'.join(placeholders)})", text):
        if piece in placeholders:
            parts.append(open_part(piece.strip("<>")))
        elif piece.strip():
            parts.append(text_part(piece.strip()))
    return parts


def _visual_part(part: dict) -> dict:
    kind = PART_TYPES.get(part.get("type")) if isinstance(part.get("type"), str) else None
    if kind is None:
        raise UnreadableRecordError("a part that is neither text nor image nor clip")
    value = next((part[name] for name in (kind, f"{kind}_url", "url", "path") if part.get(name)), None)
    return {"type": kind, kind: value.get("url", value) if isinstance(value, dict) else value}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def open_part(kind: str) -> dict:
    """The place of an image or a clip that the record holds elsewhere."""
    return {"type": kind, kind: None}


def list_in(value, start: str):
    """The list that a string encodes as JSON; anything else unchanged."""
    if isinstance(value, str) and value.startswith(start):
        try:
            return json.loads(value)
        except json.JSONDecodeError:  # a path or a text that happens to begin so
            return value
    return value
