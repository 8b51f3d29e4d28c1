"""The libraries' own tests on tiny models of the real classes; run by name only, with `make test-upstream`."""

import re
import sys
from pathlib import Path

import pytest
from transformers import testing_utils


SOURCES = Path(__file__).parent / ".sources"
sys.path += [str(SOURCES), str(Path(__file__).parents[1] / "modeling")]


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers of the suites, which `--strict-markers` would refuse."""
    for path in [Path(testing_utils.__file__), *SOURCES.rglob("*.py")]:
        for marker in set(re.findall(r"\bmark\.(\w+)", path.read_text(encoding="utf-8"))):
            config.addinivalue_line("markers", f"{marker}: of the library's suite")
