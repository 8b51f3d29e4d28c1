"""Training state on disk: tensors in safetensors, the rest in JSON, whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary folder beside `path`, which then takes its name: a killed run leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def has_folder(path: Path) -> bool:
    """Whether `write_folder` has written `path`; one that a killed run had set aside comes back."""
    old = path.with_name(path.name + ".old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    return path.exists()


def write_text(path: Path, text: str) -> None:
    """A file, written beside its place and renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_state(folder: Path, name: str, state: dict) -> None:
    """A nested dict of tensors, numbers, strings and lists as `name`.safetensors and `name`.json."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(value, path: str):
        if isinstance(value, torch.Tensor):
            assert path not in tensors, path  # {"a.b": ...} beside {"a": {"b": ...}}
            tensors[path] = value.detach().clone(memory_format=torch.contiguous_format)  # tied weights share memory
            return {"__tensor__": path}
        if isinstance(value, dict):
            return {"__items__": [[key, strip(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [strip(item, f"{path}.{i}") for i, item in enumerate(value)]
        return value

    (folder / f"{name}.json").write_text(json.dumps(strip(state, name)))
    save_file(tensors, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> dict:
    """What `save_state` wrote; tuples come back as lists."""
    tensors = load_file(folder / f"{name}.safetensors")

    def restore(value):
        if isinstance(value, dict):
            if "__tensor__" in value:
                return tensors[value["__tensor__"]]
            return {key: restore(item) for key, item in value["__items__"]}
        return [restore(item) for item in value] if isinstance(value, list) else value

    return restore(json.loads((folder / f"{name}.json").read_text()))
