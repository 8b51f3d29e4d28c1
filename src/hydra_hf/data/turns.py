"""Dialogues with drawn images to training samples. An image is noised where it is learnt, and clean for what follows it: one
sample for each, since both in one row would read it twice."""

import random

from .tasks import UnreadableRecordError, images_of


def one_conversation(messages: list[dict], rng: random.Random | None) -> list[dict]:
    """One of the conversations of `split_turns`, by chance or the first. Raises UnreadableRecordError if nothing is drawn."""
    conversations = split_turns(messages)
    if len(conversations) == 1:
        raise UnreadableRecordError("no image of the assistant")
    return conversations[0] if rng is None else rng.choice(conversations)


def split_turns(messages: list[dict]) -> list[list[dict]]:
    """The conversations of one dialogue: for each image of the assistant, one that ends with it; and the whole dialogue.

    The assistant's other images are marked `is_given`: they are read, clean, and nothing up to them is scored again. So every
    image and every token of the assistant is learnt in one of the conversations. The whole dialogue is there even if it ends
    with an image: it teaches to end the turn after one.
    """
    given = [_with_given_images(message) for message in messages]
    conversations = []
    for turn, message in enumerate(messages):
        drawn = [place for place, part in enumerate(message["content"]) if _is_drawn(message, part)]
        for place in drawn:
            parts = [*given[turn]["content"][:place], message["content"][place]]
            conversations.append([*given[:turn], {**message, "content": parts}])
    return [*conversations, given]


def _with_given_images(message: dict) -> dict:
    parts = [part | {"is_given": True} if _is_drawn(message, part) else part for part in message["content"]]
    return {**message, "content": parts}


def _is_drawn(message: dict, part: dict) -> bool:
    return message["role"] == "assistant" and bool(images_of([{"content": [part]}]))
