"""Training state on disk: tensors in safetensors, the rest in JSON."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


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
