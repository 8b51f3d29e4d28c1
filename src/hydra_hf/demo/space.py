"""A folder that serves the page anywhere, as a Space of the Hub does: app.py, requirements.txt, README.md and the package itself."""

import os
import shutil
from importlib.metadata import requires, version
from pathlib import Path

from huggingface_hub import SpaceCardData

import hydra_hf
from hydra_hf.files import write_folder
from hydra_hf.hub import check_model_name


PACKAGE = Path(hydra_hf.__file__).parent
APP = '''"""The page of {title}, made by `hydra demo --space`."""

from pathlib import Path

import torch

import hydra_hf
from hydra_hf.demo.page import launch


MODEL = {model}

device = "cuda" if torch.cuda.is_available() else "cpu"
launch(hydra_hf.HydraPipeline.from_pretrained(MODEL).to(device), MODEL)
'''
README = """---
{metadata}
---

# {title}

A page for a HYDRA model: `pip install -r requirements.txt`, then `python app.py`.
The folder `hydra_hf` is the package that runs it{copied}.
"""
FILES = {"app.py", "requirements.txt", "README.md", "hydra_hf", "model"}


def write_space(folder: Path, model: str) -> None:
    """Writes the folder with a copy of the package, and of the model too if it is a folder and not the embedded one.

    Raises ValueError for a folder with other files than an earlier call has written, and for a name that is no model's.
    """
    check_model_name(model)
    if folder.exists() and (others := {path.name for path in folder.iterdir()} - FILES):
        raise ValueError(
            f"{folder} has {sorted(others)[:5]}, expected a new folder, or one that `hydra demo --space` wrote."
        )
    write_folder(folder, lambda space: _fill(space, model))


def _fill(space: Path, model: str) -> None:
    unused = [] if model == hydra_hf.TINY else [Path(hydra_hf.TINY).name]
    shutil.copytree(PACKAGE, space / "hydra_hf", ignore=shutil.ignore_patterns("__pycache__", *unused))
    path, copied = repr(model), ""
    if model == hydra_hf.TINY:
        path = "hydra_hf.TINY"
    elif os.path.isdir(model):
        path, copied = 'str(Path(__file__).parent / "model")', ", `model` the model's files"
        shutil.copytree(model, space / "model")
    title = Path(model).resolve().name if os.path.isdir(model) else model
    text = README.format(metadata=_metadata(model, title).to_yaml(), title=title, copied=copied)
    (space / "README.md").write_text(text, encoding="utf-8")
    (space / "app.py").write_text(APP.format(title=title, model=path), encoding="utf-8")
    (space / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements()), encoding="utf-8")


def _metadata(model: str, title: str) -> SpaceCardData:
    return SpaceCardData(
        title=title, emoji="🐉", colorFrom="yellow", colorTo="blue", sdk="gradio", sdk_version=version("gradio"),
        python_version="3.11", app_file="app.py", license="apache-2.0", models=None if os.path.isdir(model) else [model],
        short_description="One model that sees, answers and draws",
    )  # fmt: skip


def requirements() -> list[str]:
    """What the package needs to serve the page, as lines for pip."""
    lines = [line.partition(";") for line in requires("hydra_hf")]
    return [requirement.strip() for requirement, _, marker in lines if not marker or 'extra == "demo"' in marker]
