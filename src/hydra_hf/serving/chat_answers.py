"""Answers of a chat in OpenAI's format. Images are in `message.images`, each with its place in the text."""

import json
from dataclasses import dataclass, field

from .images import data_url
from .jobs import Done


@dataclass
class AnswerParts:
    """The text of an answer so far, and its images."""

    text: str = ""
    images: list[dict] = field(default_factory=list)

    def add_image(self, encoded: str) -> dict:
        """The image as a part that may be sent back: after `offset` characters of the text."""
        self.images.append({
            "type": "image_url", "index": len(self.images), "offset": len(self.text),
            "image_url": {"url": data_url(encoded)},
        })  # fmt: skip
        return self.images[-1]


def completion(head: dict, answers: list[AnswerParts], ends: list[Done]) -> dict:
    """The body of a finished chat."""
    choices = []
    for index, (answer, end) in enumerate(zip(answers, ends)):
        message = {"role": "assistant", "content": answer.text or None, "refusal": None}
        if answer.images:
            message["images"] = answer.images
        choices.append({"index": index, "message": message, "finish_reason": end.reason, "logprobs": None})
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage(ends)}


def usage(ends: list[Done]) -> dict:
    """Tokens of the prompt, and of all answers with their images."""
    prompt, completions = ends[0].prompt_tokens, sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt, "completion_tokens": completions, "total_tokens": prompt + completions,
        "completion_tokens_details": {"image_tokens": sum(end.image_tokens for end in ends)},
    }  # fmt: skip


def chunk(head: dict, index: int | None, delta: dict, reason: str | None = None) -> dict:
    """A part of the answer `index`; None for a chunk without choices."""
    choices = [] if index is None else [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}]
    return {**head, "object": "chat.completion.chunk", "choices": choices}


def event_line(body: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
