"""A folder that serves the page anywhere, as a Space of the Hub does: app.py, requirements.txt, README.md and the package itself."""

import os
import shutil
from importlib.metadata import requires, version
from pathlib import Path

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
CARD = """---
title: {title}
emoji: 🐉
colorFrom: yellow
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
{models}license: apache-2.0
short_description: One model that sees, answers and draws
---

# {title}

A page for a HYDRA model: `pip install -r requirements.txt`, then `python app.py`.
The folder `hydra_hf` is the package that runs it{copied}.
"""


def write_space(folder: Path, model: str) -> None:
    """Writes the folder with a copy of the package, and of the model too if it is a folder and not the embedded one.

    Raises ValueError for a folder that holds anything other than a Space, and for a name that is no model's.
    """
    check_model_name(model)
    if folder.exists() and any(folder.iterdir()) and not (folder / "app.py").is_file():
        raise ValueError(f"{folder} is not empty and has no app.py, expected an empty folder or a Space to replace.")
    is_embedded, is_folder = model == hydra_hf.TINY, os.path.isdir(model)
    names = {"title": Path(model).resolve().name if is_folder else model, "gradio": version("gradio")}
    path = "hydra_hf.TINY" if is_embedded else 'str(Path(__file__).parent / "model")' if is_folder else repr(model)

    def write(space: Path) -> None:
        ignored = ["__pycache__"] + ([] if is_embedded else [Path(hydra_hf.TINY).name])
        shutil.copytree(PACKAGE, space / "hydra_hf", ignore=shutil.ignore_patterns(*ignored))
        if is_folder and not is_embedded:
            shutil.copytree(model, space / "model")
        models, copied = ("", ", `model` the model's files") if is_folder else (f"models: [{model}]\n", "")
        texts = {
            "app.py": APP.format(model=path, **names),
            "README.md": CARD.format(models=models, copied="" if is_embedded else copied, **names),
            "requirements.txt": "".join(f"{line}\n" for line in requirements()),
        }
        for name, text in texts.items():
            (space / name).write_text(text, encoding="utf-8")

    write_folder(folder, write)


def requirements() -> list[str]:
    """What the package needs to serve the page, as lines for pip."""
    lines = [line.partition(";") for line in requires("hydra_hf")]
    return [requirement.strip() for requirement, _, marker in lines if not marker or 'extra == "demo"' in marker]
