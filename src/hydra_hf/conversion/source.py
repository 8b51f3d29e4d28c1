"""Published checkpoints, read tensor by tensor, with every name in them accounted for."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hydra_hf.hub import check_model_name


DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_LISTED = 8

Translate = Callable[[str, Tensor], dict[str, Tensor] | None]
"""Turns a source's tensor into this package's names and tensors; {} if the name is not needed, None if no rule knows it."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: its file, and its shape and type according to the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Source:
    """A folder or a Hub repository: its config, and its tensors by name. Raises ValueError if it cannot be read."""

    def __init__(self, name: str, revision: str | None = None):
        self.name = name
        self.folder = _find_folder(name, revision)
        self.config = _read_json(self.folder / "config.json")
        self.tensors: dict[str, StoredTensor] = {}
        for file in _find_weights(name, self.folder):
            self.tensors |= _read_header(file)

    def read(self, name: str) -> Tensor:
        """The tensor of this name, read from its file."""
        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)


def _find_folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder and has no {revision=}; revisions are for the Hub.")
        return Path(name)
    check_model_name(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _find_weights(name: str, folder: Path) -> list[Path]:
    index, whole = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        files = [folder / file for file in sorted(set(_read_json(index)["weight_map"].values()))]
    elif whole.is_file():
        files = [whole]
    elif any(folder.glob("*.bin")):
        raise ValueError(
            f"{name} has only pickled weights (*.bin), which are never opened here; expected safetensors."
        )
    else:
        raise ValueError(f"{name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{name} lacks the files {missing} that its index names.")
    return files


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            return {
                name: StoredTensor(path, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


@dataclass(frozen=True)
class Origin:
    """The source tensor that a target is made from, and how."""

    source: Source
    name: str
    translate: Translate

    @property
    def dtype(self) -> torch.dtype:
        """Raises ValueError if the weights are not plain floats, such as quantised ones."""
        stored = self.source.tensors[self.name].dtype
        if stored not in DTYPES:
            raise ValueError(f"{self.name} of {self.source.name} is of type {stored}, expected one of {list(DTYPES)}.")
        return DTYPES[stored]

    def read(self, target: str, dtype: torch.dtype) -> Tensor:
        """The tensor of the name `target`, as a copy, so that the file can be closed."""
        value = self.translate(self.name, self.source.read(self.name))[target]
        return value.to(dtype, copy=True, memory_format=torch.contiguous_format)


def find_origins(
    sources: list[tuple[Source, Translate]], targets: dict[str, Tensor], new: set[str]
) -> dict[str, Origin]:
    """Where each of `targets` comes from, except the `new` ones; reads only headers.

    Raises ValueError that lists every name no rule knows, every shape that differs, every target that is filled twice and
    every target that is left without a value.
    """
    origins: dict[str, Origin] = {}
    unexpected, misshapen, repeated = [], [], []
    for source, translate in sources:
        for name, stored in source.tensors.items():
            translated = translate(name, torch.empty(stored.shape, device="meta"))
            if translated is None or not translated.keys() <= targets.keys():
                unexpected.append(name)
                continue
            for target, value in translated.items():
                if target in origins:
                    repeated.append(name)
                elif value.shape != targets[target].shape:
                    misshapen.append(
                        f"{name} gives {tuple(value.shape)} for {tuple(targets[target].shape)} of {target}"
                    )
                origins[target] = Origin(source, name, translate)
    missing = [target for target in targets if target not in origins and target not in new]
    problems = {"unexpected": unexpected, "of another shape": misshapen, "repeated": repeated, "missing": missing}
    if found := [f"{len(names)} {problem}: {_listed(names)}" for problem, names in problems.items() if names]:
        raise ValueError(f"The weights are not those of the config. {'; '.join(found)}.")
    return origins


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
    return ", ".join([*names[:MAX_LISTED], *more])
