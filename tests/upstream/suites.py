"""What the files here share: a suite or a reason why not, and the table of tests that do not apply."""

import unittest
import warnings
from importlib import import_module
from types import ModuleType

import pytest


COMMAND = "python tests/upstream/fetch.py"


def suite(module: str) -> ModuleType:
    """A module of the fetched sources; without it, the file that asks skips and names the command that fetches."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # suites import what their own library deprecates
            return import_module(module)
    except ModuleNotFoundError as error:
        if not error.name.startswith(module.split(".")[0]) and error.name != "parameterized":
            raise
        pytest.skip(
            f"{error.name} is missing; run `pip install parameterized` and `{COMMAND}`", allow_module_level=True
        )


def skips(reasons: dict[str, str]):
    """Skips tests of a mixin, each with its reason; a name ending in * is all that start so. A name without test is an error."""

    def decorate(test_class: type) -> type:
        for name, reason in reasons.items():
            found = [
                test for test in dir(test_class) if test == name or (name[-1] == "*" and test.startswith(name[:-1]))
            ]
            assert found, f"{test_class.__name__} has no test {name!r}, which the table of skips names."
            for test in found:
                setattr(test_class, test, unittest.skip(reason)(getattr(test_class, test)))
        return test_class

    return decorate
