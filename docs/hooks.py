"""What mkdocs calls for every page: puts parts of the README, whole files and tables made from the code where a page names them.

<!-- include: README.md # Drawing -->    what is below this heading, up to the next heading of any level
<!-- include: LOG.md -->                 the whole file
<!-- table: formulas -->                 a table of `code_tables.TABLES`
"""

import re
from pathlib import Path

from code_tables import TABLES


ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page, **_) -> str:
    to_docs = "../" * page.file.src_uri.count("/")

    def include(match: re.Match) -> str:
        return included(*match.groups()).replace("](docs/", f"]({to_docs}").strip()

    markdown = re.sub(r"<!-- include: (\S+)(?: # (.+))? -->", include, markdown)
    return re.sub(r"<!-- table: (\w+) -->", lambda match: TABLES[match[1]](), markdown)


def included(file: str, heading: str | None) -> str:
    """A file of the repository, or what is below one of its headings. Raises ValueError for a heading that is not there once."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if heading is None:
        return text
    found = [body for name, body in parts(text) if name == heading]
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} headings {heading!r}, expected one.")
    return found[0]


def parts(text: str) -> list[tuple[str, str]]:
    """Each heading with the text up to the next one; a line of a code block is no heading."""
    found, is_code = [("", "")], False
    for line in text.splitlines(keepends=True):
        is_code ^= line.startswith("```")
        heading = None if is_code else re.match(r"#+ (.+)", line)
        found += [(heading[1], "")] if heading else []
        found[-1] = (found[-1][0], found[-1][1] + ("" if heading else line))
    return found
