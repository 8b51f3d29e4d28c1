"""Answers on the disk, a line each as soon as it is there, so that a killed run does not ask again."""

import json
from collections.abc import Iterable
from pathlib import Path


class AnswerLog:
    """A mapping of keys to answers, in memory and in a file of JSON lines; no path keeps it in memory alone."""

    def __init__(self, path: Path | None = None):
        self.path, self.answers = path, {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the run was killed
                    continue
                self.answers[row["key"]] = row["answer"]

    def __contains__(self, key: str) -> bool:
        return key in self.answers

    def __getitem__(self, key: str) -> str:
        return self.answers[key]

    def add(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = list(pairs)
        self.answers.update(pairs)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"\n{json.dumps({'key': key, 'answer': answer})}" for key, answer in pairs))
