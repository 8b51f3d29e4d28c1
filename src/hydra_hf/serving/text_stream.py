"""The text of an answer as its tokens come."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream


class TextStream:
    """Gives text as soon as it is sure: no half characters, and nothing that may still become a stop string."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer.backend_tokenizer, stop
        self.held, self.is_stopped = "", False
        self.decoder = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that is sure now; `is_stopped` says whether it ends before a stop string."""
        self.held += self.decoder.step(self.tokenizer, token) or ""
        if places := [place for text in self.stop if (place := self.held.find(text)) >= 0]:
            self.is_stopped, self.held = True, self.held[: min(places)]
            return self.finish()
        num_unsure = max((_overlap(self.held, text) for text in self.stop), default=0)
        sure, self.held = self.held[: len(self.held) - num_unsure], self.held[len(self.held) - num_unsure :]
        return sure

    def finish(self) -> str:
        """What was held back; the next token begins a new text."""
        rest, self.held = self.held, ""
        self.decoder = DecodeStream(skip_special_tokens=True)
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return max(length for length in range(len(stop)) if text.endswith(stop[:length]))
