"""Edits of data sets: which turn of a dialogue is learnt, and which pairs of images are an edit."""

import math
import random

from PIL import Image

from .tasks import UnreadableRecordError, images_of


MAX_ASPECT_CHANGE = 0.05  # from source to target (our choice): what is cropped alike may shift by half of this


def one_edit(messages: list[dict], rng: random.Random | None) -> list[dict]:
    """One edit of a dialogue, by chance or the first: its instruction with the images of the user, or without these the image
    before it, and what the assistant draws, alone. What was said before is left out, since the source shows its result."""
    drawn = [
        place for place, message in enumerate(messages) if message["role"] == "assistant" and images_of([message])
    ]
    if not drawn:
        raise UnreadableRecordError("no target image")
    place = drawn[0] if rng is None else rng.choice(drawn)
    targets, before = images_of([messages[place]]), messages[:place]
    if len(targets) > 1:
        raise UnreadableRecordError("more than one target image")
    asked = list(before[-1]["content"]) if before and before[-1]["role"] == "user" else []
    if not any(part["type"] == "text" and part["text"] for part in asked):
        raise UnreadableRecordError("no instruction")
    if not images_of([{"content": asked}]):
        asked = images_of(before)[-1:] + asked
    if not images_of([{"content": asked}]):
        raise UnreadableRecordError("no source image")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": targets}]


def check_same_aspect(source: Image.Image, target: Image.Image) -> None:
    """Raises UnreadableRecordError for images that are too unlike in aspect to show the same."""
    ratio = source.width * target.height / (source.height * target.width)
    if abs(math.log(ratio)) > math.log1p(MAX_ASPECT_CHANGE):
        raise UnreadableRecordError(
            f"a target whose aspect differs by more than {MAX_ASPECT_CHANGE:.0%} from its source's"
        )
