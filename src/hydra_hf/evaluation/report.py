"""The result of a suite: one JSON file with scores, protocol, seeds and versions, and its row in Markdown."""

import dataclasses
import json
import math
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from hydra_hf.files import write_text


FORMAT = "hydra_hf.suite/1"
TOY_WORLD = "toy world"  # the protocol's `data` of scores that are never put next to a paper's
PACKAGES = ("hydra_hf", "torch", "transformers", "diffusers", "numpy", "pillow")
NUMBER_FORMAT = ".4g"


@dataclass(frozen=True)
class SuiteResult:
    """
    What a suite measured.

    Args:
        suite: its name, as in `hydra evaluate --suite`.
        model: folder or Hub id.
        scores: `BENCHMARK` or `BENCHMARK/PART` -> value; shares are in [0, 1], other values in the benchmark's own unit. Empty
            for a suite that only draws what another program judges.
        protocol: what the numbers depend on: data, sizes, steps, guidance, scorer. Values that JSON has.
        seeds: name -> seed.
        counts: name -> how many prompts, images, questions.
        is_comparable: whether the scores may be compared with published ones.
        notes: why not, and what is left to do, each a sentence.
    """

    suite: str
    model: str
    scores: dict[str, float]
    protocol: dict
    seeds: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    is_comparable: bool = False
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: package_versions())

    def __post_init__(self):
        if bad := {name: value for name, value in self.scores.items() if not _is_finite(value)}:
            raise ValueError(f"Got the scores {bad}, expected finite numbers.")

    def markdown(self) -> str:
        """Two lines of head and one row of a Markdown table; scores that are not comparable have an asterisk."""
        mark = "" if self.is_comparable else "*"
        cells = {"model": self.model} | {name: f"{value:{NUMBER_FORMAT}}{mark}" for name, value in self.scores.items()}
        return markdown_table(list(cells), [list(cells.values())])

    def content(self) -> dict:
        """What `save` writes."""
        return {"format": FORMAT, **dataclasses.asdict(self), "markdown": self.markdown()}

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(self.content(), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "SuiteResult":
        """Raises ValueError if the file is not the result of a suite."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        kind = content.pop("format", None) if isinstance(content, dict) else None
        if kind != FORMAT:
            raise ValueError(f"{path} has the format {kind!r}, expected {FORMAT!r}, as hydra evaluate writes it.")
        content.pop("markdown", None)
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{path} lacks or adds fields: {error}") from error


def package_versions(*more: str) -> dict[str, str]:
    """The versions of Python, of the packages that every suite uses, and of `more`, which must be installed."""
    return {"python": platform.python_version()} | {name: version(name) for name in (*PACKAGES, *more)}


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; every row has as many cells as there are headers."""
    cells = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
