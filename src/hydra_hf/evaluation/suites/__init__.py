"""Benchmark suites of `hydra evaluate --suite NAME`: one module each, whose `run` takes the pipeline and its options."""

from importlib import import_module
from types import ModuleType


SUITES = {  # name -> module of this folder, what is measured
    "geneval": ("geneval", "text to image: objects, counts, colours, positions"),
}


def load_suite(name: str) -> ModuleType:
    """The module of a suite. Its `run(pipeline, model, ...)` returns a SuiteResult; its other parameters are command-line options."""
    return import_module(f"{__name__}.{SUITES[name][0]}")
