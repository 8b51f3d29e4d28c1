"""Training state on disk, tensors in safetensors and the rest in JSON; and which checkpoints of a stage are whole."""

import json
import logging
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hydra_hf.files import sync_folder, write_text


logger = logging.getLogger(__name__)

MANIFEST = "files.json"  # name -> size of every file of a checkpoint, written once all of them are on the disk
STATES = ("trainer_state.json", "step.json")  # those of the two trainers; every checkpoint has one
OF_A_PROCESS = "data-"  # files that depend on the number of processes
NUM_KEPT = 2


def save_state(folder: Path, name: str, state: dict) -> None:
    """Writes a nested dict of tensors, numbers, strings and lists as `name`.safetensors and `name`.json."""
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

    def strip(value, path: str):
        if isinstance(value, torch.Tensor):
            assert path not in tensors, path  # {"a.b": ...} next to {"a": {"b": ...}}
            tensor = value.detach().cpu().contiguous()  # copied to the host, never on the device
            storage = tensor.untyped_storage().data_ptr()
            tensors[path] = tensor.clone() if storage in storages else tensor  # tied weights share memory
            storages.add(storage)
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


def find_checkpoints(folder: Path) -> list[Path]:
    """The folders named `checkpoint-STEP`, newest first."""
    found = [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: str | Path) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint without a missing or damaged file; newer ones are skipped with a warning."""
    for checkpoint in find_checkpoints(folder):
        if (fault := find_fault(checkpoint)) is None:
            return str(checkpoint)
        logger.warning("%s is skipped: %s.", checkpoint, fault)
    return None


def find_fault(checkpoint: Path) -> str | None:
    """What is missing or damaged in a checkpoint, None if nothing is."""
    if not any((checkpoint / name).exists() for name in STATES):
        return f"it has neither {STATES[0]} nor {STATES[1]}, so its save was not finished"
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    if (checkpoint / MANIFEST).exists():
        try:
            sizes = json.loads((checkpoint / MANIFEST).read_text())
        except ValueError as error:
            return f"{MANIFEST} is damaged ({error})"
        found = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in paths}
        if wrong := [name for name, size in sizes.items() if found.get(name) != size]:
            return f"{wrong[0]} has {found.get(wrong[0])} bytes, expected {sizes[wrong[0]]}"
    for path in paths:
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # reads the header and checks the length of the file
                    pass
        except (ValueError, SafetensorError) as error:
            return f"{path.name} is damaged ({error})"
    return None


def finish_checkpoint(checkpoint: Path) -> None:
    """Flushes a checkpoint to the disk, and then lists its files."""
    sync_folder(checkpoint)
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(OF_A_PROCESS)]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in paths if path.name != MANIFEST}
    write_text(checkpoint / MANIFEST, json.dumps(sizes))


def remove_old_checkpoints(folder: Path, newest: Path) -> None:
    """Keeps `newest` and the one before it. Later ones are from before the run was resumed from an earlier checkpoint."""
    earlier = [path for path in find_checkpoints(folder) if step_of(path) <= step_of(newest)]
    kept = {step_of(path) for path in earlier[:NUM_KEPT]}
    for path in folder.iterdir():
        is_state = re.fullmatch(r"(checkpoint|shards)-\d+", path.name)  # shards are saved next to their checkpoint
        if is_state and path.is_dir() and step_of(path) not in kept:
            shutil.rmtree(path)


def forget_later_rows(log: Path, step: int) -> None:
    """Drops the rows of steps that a resumed run repeats, and a last one that was cut off."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            break
    write_text(log, "".join(f"{line}\n" for line in kept))
