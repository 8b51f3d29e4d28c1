"""Latents of a data set, encoded once and kept: the posterior's means of the images of each record, by the record's number.

A folder holds `latents.json`, which says what they were made from, and shards of a fixed number of records in safetensors:
`num_images` (num_records,), `image_grid_thw` (num_images, 3), `means` (total_tokens, C). HYDRA is trained on the means.
Stamps say what the files of a record's images held, where these are files of their own: data are known by their own digests.
"""

import hashlib
import json
import os
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydra_hf.files import write_file, write_text
from hydra_hf.modeling import HydraImageProcessor
from hydra_hf.modeling.grid import Grid, num_tokens

from .fingerprint import difference, fingerprint
from .sources import Source
from .tasks import UnreadableRecordError


NAME = "latents.json"
SHARD_SIZE = 1024  # records of one file
OPEN_SHARDS = 64  # the most that a process keeps mapped into memory
Encoded = list[tuple[Grid, Tensor]]  # the images of one record: grid, means (N, C)


Stamp = list[int | str]  # of a file: size, time of change in ns, digest


class StaleLatentsError(ValueError):
    """Latents of an image that has other contents now."""


def stamp(file: Path) -> Stamp:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()]


def is_unchanged(file: Path, before: Stamp) -> bool:
    """Whether a file has the contents that its stamp says. It is read only if its time is another one, as of a copy."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns] == before[:2] or (
        status.st_size == before[0] and stamp(file)[2] == before[2]
    )


def describe_data(source: Source, image_processor: HydraImageProcessor) -> dict[str, Any]:
    """What the pixels of a source are, as JSON values: its files, and the sizes and parts of its images."""
    policy = json.loads(json.dumps(image_processor.to_dict()))
    written_by_the_library = ("image_processor_type", "processor_class")
    return {
        "source": fingerprint(replace(source, weight=1.0)),
        "image_policy": {name: value for name, value in policy.items() if name not in written_by_the_library},
    }


def check_same(folder: Path, made_with: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ValueError, naming the field, if the latents in `folder` are not those of the `given` data or encoder."""
    if "source" in given and (changed := difference([made_with["source"]], [given["source"]])):
        raise ValueError(
            f"{folder} holds the latents of other data: {changed}. Prepare these in a folder of their own."
        )
    for part in ("image_policy", "encoder"):
        before, now = made_with[part], given.get(part, {})
        for name in (
            name for name in before if name in now and before[name] != now[name]
        ):  # a field that only one of them has belongs to another version
            raise ValueError(
                f"{folder} was made with {part}.{name}={before[name]!r}, but this run has {now[name]!r}:"
                " `hydra prepare latents` makes those of this run in a folder of their own."
            )


def read_description(folder: Path) -> dict[str, Any] | None:
    """What a folder of latents was made with, None for one without latents. Raises ValueError for a damaged file."""
    try:
        described = json.loads((folder / NAME).read_text())
        return {name: described[name] for name in ("source", "image_policy", "encoder", "num_records", "shard_size")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{folder / NAME} cannot be read, so it is not known what the latents were made from: {error}"
        ) from error


def write_description(folder: Path, description: dict[str, Any]) -> None:
    write_text(folder / NAME, json.dumps(description, indent=2) + "\n")


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def missing_shards(folder: Path, description: dict[str, Any]) -> list[int]:
    """The shards that are not there yet."""
    found = set(os.listdir(folder))
    count = -(-description["num_records"] // description["shard_size"])
    return [number for number in range(count) if shard_path(folder, number).name not in found]


def write_shard(path: Path, records: list[Encoded | str], stamps: list[list[Stamp]], latent_channels: int) -> None:
    """Writes what the encoder gave for some records, and their stamps; a text is the reason why one has no latents."""
    from safetensors.torch import save_file

    images = [[] if isinstance(record, str) else record for record in records]
    parts = [part for record in images for part in record]
    tensors = {
        "num_images": torch.tensor([len(record) for record in images]),
        "image_grid_thw": torch.tensor([grid for grid, _ in parts], dtype=torch.long).reshape(-1, 3),
        "means": torch.cat([means for _, means in parts]) if parts else torch.empty(0, latent_channels),
    }
    reasons = {str(place): record for place, record in enumerate(records) if isinstance(record, str)}
    metadata = {"unreadable": json.dumps(reasons), "stamps": json.dumps(stamps)}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata))


class Shard:
    """A file of latents, of which only the records asked for are read."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        self.file = safe_open(path, "pt")
        self.unreadable, self.stamps = (json.loads(self.file.metadata()[name]) for name in ("unreadable", "stamps"))
        self.grids = [tuple(grid) for grid in self.file.get_tensor("image_grid_thw").tolist()]
        self.first_image = [0, *accumulate(self.file.get_tensor("num_images").tolist())]
        self.first_token = [0, *accumulate(map(num_tokens, self.grids))]
        self.means = self.file.get_slice("means")

    def __getitem__(self, place: int) -> Encoded:
        if (reason := self.unreadable.get(str(place))) is not None:
            raise UnreadableRecordError(reason)
        images = range(self.first_image[place], self.first_image[place + 1])
        return [(self.grids[n], self.means[self.first_token[n] : self.first_token[n + 1]]) for n in images]


class StoredLatents:
    """The latents of the records of a source, by number; a record that could not be encoded is an `UnreadableRecordError`.

    Raises ValueError for a folder without them, one that is not finished, or latents of other data or another image policy.
    """

    def __init__(self, source: Source, image_processor: HydraImageProcessor):
        self.folder = Path(source.latents).expanduser()
        command = f"run `hydra prepare latents` with {source.task}={source.path},latents={source.latents}"
        description = read_description(self.folder)
        if description is None:
            raise ValueError(f"{self.folder} has no latents of {source.path}: {command}.")
        check_same(self.folder, description, describe_data(source, image_processor))
        if missing := missing_shards(self.folder, description):
            raise ValueError(f"{self.folder} lacks {len(missing)} files, such as {shard_path(self.folder, missing[0]).name}:"
                             f" {command}, which resumes where it stopped.")  # fmt: skip
        self.shard_size, self.latent_channels = description["shard_size"], description["encoder"]["latent_channels"]
        self.shards: dict[int, Shard] = {}  # the last ones used

    def __getitem__(self, record: int) -> Encoded:
        number, place = divmod(record, self.shard_size)
        return self._shard(number)[place]

    def check_unchanged(self, record: int, files: list[Path]) -> None:
        """Raises `StaleLatentsError` if a file of the record's images has other contents than those that were encoded; one that
        is gone is not needed."""
        number, place = divmod(record, self.shard_size)
        for file, before in zip(files, self._shard(number).stamps[place]):
            if file.is_file() and not is_unchanged(file, before):
                raise StaleLatentsError(
                    f"{file} has changed since its latents were made: delete {self.folder}, or of it what is stale such as"
                    f" {shard_path(self.folder, number).name}, and run `hydra prepare latents` again."
                )

    def _shard(self, number: int) -> Shard:
        if number not in self.shards:
            if len(self.shards) >= OPEN_SHARDS:
                del self.shards[next(iter(self.shards))]
            self.shards[number] = Shard(shard_path(self.folder, number))
        return self.shards[number]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"shards": {}}  # a worker opens its own
