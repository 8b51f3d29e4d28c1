"""Tables of the site that are made from the comments and docstrings of the code."""

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


SOURCE = Path(__file__).parents[1] / "src" / "hydra_hf"
FORMULA = re.compile(r"(?:(\w+ et al\.,? \d{4}), )?(eq\. \d+(?:-\d+)?|\bL_[A-Za-z]+|\(?x_t [-=] [^;:.]*)")
SECTION = re.compile(r"(HYDRA-X|HYDRA|UniMRG)(?: \(|, )(sections? [\d., and]*\d|figure \d)")
OURS = re.compile(r"\bour (?:choice|default)|\bours\b")
RECIPES = ("hydra_tok", "hydra", "hydra_x_tok", "hydra_x", "unimrg")


@dataclass(frozen=True)
class Note:
    """A docstring, or a comment with the code in front of it; `line` is its first, `owner` the definition that it is in."""

    path: str
    line: int
    owner: str
    text: str
    code: str = ""


def notes(path: Path) -> Iterator[Note]:
    """The docstrings of a file, then its comments."""
    source, name = path.read_text(encoding="utf-8"), path.relative_to(SOURCE).as_posix()
    owners = list(definitions(ast.parse(source)))
    for owner, node in owners:
        if text := ast.get_docstring(node, clean=False):
            yield Note(name, node.body[0].lineno, owner, text)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt:"):
            line = token.start[0]
            owner = [owner for owner, node in owners[1:] if node.lineno <= line <= node.end_lineno]
            code = token.line[: token.start[1]].strip()
            yield Note(name, line, owner[-1] if owner else "", token.string.lstrip("# "), code)


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(dotted name, node) of a module, its classes and its functions, each before what it contains."""
    yield prefix.rstrip("."), node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from definitions(child, f"{prefix}{child.name}.")


@cache
def all_notes() -> list[Note]:
    """Those of every file of the package."""
    return [note for path in sorted(SOURCE.rglob("*.py")) for note in notes(path)]


def formulas() -> str:
    """Every line that names an equation or a loss, by paper."""
    rows, of_file = [], {}
    for note in all_notes():
        named = re.search(r"HYDRA-X|HYDRA|UniMRG", note.text)
        of_file.setdefault(note.path, named[0] if named else "")
        for match in [] if note.path.startswith("training/recipes/") else FORMULA.finditer(note.text):
            number = note.text.count("\n", 0, match.start())
            written = note.text.splitlines()[number].strip()
            paper = match[1] or (named[0] if named else of_file[note.path])
            shown = code(f"{note.code}  # {written}") if note.code else escape(written)
            place = f"`{note.path}:{note.line + number}`"
            rows.append((paper, escape(match[2].strip()), place, code(note.owner), shown))
    return table(("paper", "formula", "line", "in", "what is written there"), sorted(set(rows), key=by_number))


def sections() -> str:
    """Which files say that they are a section of a paper, and what they are."""
    rows = [
        (paper, section, code(note.path), escape(sentences(note.text)[0]))
        for note in all_notes() if not note.owner and not note.code
        for paper, section in SECTION.findall(note.text)
    ]  # fmt: skip
    return table(("paper", "section", "file", "what it is"), sorted(set(rows), key=by_number))


def recipes() -> str:
    """The marked values of the recipes of full size, as they are in the files."""
    rows = []
    for name in RECIPES:
        path = SOURCE / "training" / "recipes" / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for note in notes(path):
            is_ours = OURS.search(note.text) or "not given" in note.text
            is_given = re.search(r"(?<!not )\bgiven", note.text)
            if note.code and (is_ours or is_given):
                whose = "in part" if is_ours and is_given else "ours" if is_ours else "the paper's"
                rows.append((code(name), str(note.line), code(value_at(tree, note)), whose, escape(note.text)))
    return table(("recipe", "line", "value", "whose", "what the comment says"), rows)


def value_at(tree: ast.Module, note: Note) -> str:
    """The whole assignment or argument that begins or ends where a comment is; at most 120 characters."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.keyword | ast.Assign)
             and note.line in (node.lineno, node.end_lineno)]  # fmt: skip
    text = ast.unparse(max(found, key=lambda node: node.end_lineno - node.lineno + node.end_col_offset / 1000)) \
        if found else note.code.rstrip(",")  # fmt: skip
    return text if len(text) <= 120 else f"{text[:117]}..."


def choices() -> str:
    """Every sentence outside the recipes that says that something is our choice."""
    rows = []
    for note in all_notes():
        for sentence in [] if note.path.startswith("training/recipes/") else sentences(note.text):
            if re.search(r"\bour choice\b", sentence):
                shown = f"{code(note.code)}: {escape(sentence)}" if len(note.code) > 1 else escape(sentence)
                rows.append((f"`{note.path}:{note.line}`", code(note.owner), shown))
    return table(("line", "in", "what"), rows)


def sentences(text: str) -> list[str]:
    """The sentences of a docstring, and its arguments, each on one line."""
    parts = re.split(r"\n\s*\n|\n(?=\s+[\w, ]+: )|(?<=\.)\s+(?=[A-Z`])", text)
    return [" ".join(part.split()) for part in parts]


def code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`" if text else ""


def escape(text: str) -> str:
    """Text as it is written, in a cell of a table; what is between backticks stays code."""
    return re.sub(r"`[^`]*`|[*<|]", lambda match: match[0] if match[0][0] == "`" else f"\\{match[0]}", text)


def by_number(row: tuple[str, ...]) -> list:
    """A key that sorts "section 10" behind "section 9"."""
    return [[int(part) if part.isdigit() else 0, part] for part in re.split(r"(\d+)", " ".join(row[:3]))]


def table(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {"formulas": formulas, "sections": sections, "recipes": recipes, "choices": choices}
