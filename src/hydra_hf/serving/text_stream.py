"""The text of an answer as its tokens come."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream


class TextStream:
    """Gives text as soon as it is sure: no half characters, and nothing that may still become a stop string."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.is_stopped = tokenizer, stop, False
        self._restart()

    def _restart(self) -> None:
        self.tokens, self.held, self.num_given = [], "", 0
        self.decoder = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that is sure now; `is_stopped` says whether it ends before a stop string."""
        self.tokens.append(token)
        self.held += self.decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        if places := [place for text in self.stop if (place := self.held.find(text)) >= 0]:
            self.is_stopped = True
            return self.held[: min(places)]
        num_sure = len(self.held) - max((_overlap(self.held, text) for text in self.stop), default=0)
        sure, self.held = self.held[:num_sure], self.held[num_sure:]
        self.num_given += num_sure
        return sure

    def finish(self) -> str:
        """What was held back, with half characters as `decode` shows them; the next token begins a new text."""
        text = "" if self.is_stopped else self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        rest = text[self.num_given :]
        self._restart()
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return max(length for length in range(len(stop)) if text.endswith(stop[:length]))
