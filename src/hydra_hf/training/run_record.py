"""`run.json` records what a run folder was made with, so that it refuses a run of another recipe or on other data.

It has every field that decides the outcome, and none that only decides the speed or what is logged.
"""

import hashlib
import json
import logging
import platform
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, ProcessorMixin

from hydra_hf.data.fingerprint import difference, fingerprint
from hydra_hf.data.sources import Sources
from hydra_hf.files import has_folder, write_text

from .checkpoints import find_checkpoints
from .recipe import Data, Recipe, Stage


logger = logging.getLogger(__name__)

NAME = "run.json"
PACKAGES = ("torch", "transformers", "diffusers", "accelerate")
MODELS = (
    "init",
    "tokenizer",
    "teacher",
    "video_teacher",
    "teacher_weights",
    "perceptual_weights",
)  # folders, files or Hub ids
NOT_DECIDING = {
    "stages", "data", "log_every", "save_every", "sample_every", "sample_prompts", "num_workers", "micro_batch_size",
    "micro_batch_tokens", "gradient_checkpointing", "attn_implementation", "num_inference_steps", "guidance_scale", "held_out", "num_held_out",
    "frechet_backbone", "frechet_weights", "push_to",
}  # fmt: skip
WRITTEN_BY_MODELS = ("architectures", "dtype", "transformers_version", "_name_or_path")  # to their configs
EDGE = 65536  # bytes at either end of a file


def check_run(recipe: Recipe, output_dir: Path, only: str | None) -> None:
    """Raises ValueError, naming the field, if `output_dir` was made with another recipe or on other data.

    Only stages count that have saved something and that this run would train.
    """
    versions = {**{name: version(name) for name in PACKAGES}, "python": platform.python_version()}
    found = read_record(output_dir)
    saved = [
        name
        for name in (found["stages"] if found else [s.name for s in recipe.stages])
        if has_saved(output_dir / name)
    ]
    if found is None or not saved:
        if saved:
            logger.warning("%s has no %s, so it is not known what it was made with.", output_dir, NAME)
        found = {"versions": versions, "recipe": {}, "stages": {}}
    compare(found["recipe"], describe(recipe), output_dir, "")
    for stage in recipe.stages:
        if only in (None, stage.name) and stage.name in found["stages"] and stage.name in saved:
            expected = found["stages"][stage.name]
            if may_be_longer(stage, expected, has_folder(output_dir / stage.name / "final")):
                expected = {**expected, "num_steps": stage.num_steps}
            compare(expected, describe_stage(recipe, stage), output_dir, f"{stage.name}.")
    if found["versions"] != versions:
        logger.warning("%s was begun with %s and is resumed with %s.", output_dir, found["versions"], versions)
    write_record(output_dir, {**found, "recipe": describe(recipe)})


def has_saved(folder: Path) -> bool:
    """Whether a stage has a result or a checkpoint, so that a later run would build on it."""
    return has_folder(folder / "final") or bool(find_checkpoints(folder))


def may_be_longer(stage: Stage, expected: dict, is_done: bool) -> bool:
    """Whether an unfinished stage may get more steps: its steps so far are the same only if the rate does not decay at the end."""
    return not is_done and stage.decay_share == 0 and stage.num_steps > expected["num_steps"]


def begin_stage(recipe: Recipe, stage: Stage, output_dir: Path) -> None:
    """Records what a stage is made with, before its first step."""
    found = read_record(output_dir)
    write_record(output_dir, {**found, "stages": {**found["stages"], stage.name: describe_stage(recipe, stage)}})


def read_record(output_dir: Path) -> dict | None:
    """The record in `run.json`, None if there is none. Raises ValueError for a damaged one."""
    path = output_dir / NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return {name: dict(found[name]) for name in ("versions", "recipe", "stages")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, so it is not known what the run was made with: {error}") from error


def write_record(output_dir: Path, record: dict) -> None:
    write_text(output_dir / NAME, json.dumps(record, indent=2) + "\n")


def compare(expected: dict, given: dict, output_dir: Path, prefix: str) -> None:
    """Raises ValueError for the first field that differs; a field that only one of them has belongs to another version."""
    if isinstance(expected.get("data"), list) and isinstance(given.get("data"), list):
        if changed := difference(expected["data"], given["data"]):
            raise ValueError(
                f"{output_dir} was made with other {prefix}data: {changed}. Give this run a folder of its own."
            )
        expected = {name: value for name, value in expected.items() if name != "data"}
    for name in sorted(expected.keys() & given.keys(), key=lambda name: (name != "name", name)):
        if content_of(expected[name]) != content_of(given[name]):
            raise ValueError(
                f"{output_dir} was made with {prefix}{name}={expected[name]!r}, but this run has {given[name]!r}:"
                " give it a folder of its own, or the same options."
            )


def content_of(value):
    """The part of a recorded value that counts: for files their content, wherever they are."""
    return {**value, "path": None} if isinstance(value, dict) and "content" in value else value


# Values as JSON, by dotted names


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe's own fields."""
    return json.loads(json.dumps(flatten(recipe)))


def describe_stage(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The fields of a stage, and its data."""
    data = recipe.data_of(stage)
    return json.loads(json.dumps({**flatten(stage), "data": describe_data(data)}))


def describe_data(data: Data | None) -> Any:
    """Data sets by the contents of their files, other data by its type and fields."""
    if isinstance(data, Sources):
        return [fingerprint(source) for source in data.sources]
    return {"type": type(data).__qualname__, **(asdict(data) if is_dataclass(data) else {})}


def flatten(value, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, through dataclasses and configs; a plain dict is one value."""
    if isinstance(value, PreTrainedConfig):
        items = value.to_dict()
    elif isinstance(value, ProcessorMixin):
        words = (sorted(value.tokenizer.get_vocab().items()), value.chat_template)
        items = {"text_tokenizer": digest(repr(words).encode()), "image": value.image_processor.to_dict()}
    elif is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in NOT_DECIDING}
    elif isinstance(value, dict) and prefix.startswith(("config.", "decoder_config.", "processor.")):
        items = value
    else:
        return {prefix.removesuffix("."): describe_value(value, prefix.removesuffix("."))}
    flat = {}
    for name, item in items.items():
        if name not in WRITTEN_BY_MODELS:
            flat |= flatten(item, f"{prefix}{name}.")
    return flat


def describe_value(value, name: str):
    if name in MODELS and isinstance(value, str):
        return {"path": value, **describe_files(Path(value))}
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, int | float | str | dict | list | tuple | None) else str(value)


def describe_files(path: Path) -> dict[str, str]:
    """`content`: the number, total bytes and digest of a model's files, by their names, sizes, beginnings and ends; {} for a
    model that is not on this machine."""
    files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    found = hashlib.blake2b(digest_size=8)
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes):
        found.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as opened:
            found.update(opened.read(EDGE))
            opened.seek(max(0, size - EDGE))
            found.update(opened.read(EDGE))
    return {"content": f"{len(files)} files, {sum(sizes)} bytes, {found.hexdigest()}"} if files else {}


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
