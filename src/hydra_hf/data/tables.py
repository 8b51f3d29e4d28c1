"""Data sets in files and on the Hub as records: by number from a memory-mapped table, or in order from a stream."""

import hashlib
import json
import logging
import random
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path

import torch
from torch import Tensor

from .sources import HUB
from .tasks import UnreadableRecordError


logger = logging.getLogger(__name__)

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "tar"}
TAR, MEMBERS = "__tar__", "__members__"  # columns of the index of tars


def open_dataset(path: str, split: str, streaming: bool):
    """
    The `datasets.Dataset` of a path, or its IterableDataset when it is streamed.

    Raises ValueError for what is not there, is damaged as a whole, or cannot be reached.
    """
    from datasets import load_dataset

    where = {"split": split, "streaming": streaming}
    if path.startswith(HUB):
        with reading(path):
            return load_dataset(path.removeprefix(HUB), **where)
    files = find_files(path)
    builder = _builder_of(path, files)
    if builder == "imagefolder":
        files = [str(Path(escape(files[0])) / "**")]
    with reading(path):
        if builder == "tar":
            return _open_tars(files, streaming)
        return load_dataset(builder, data_files={split.partition("[")[0]: files}, **where)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What `datasets` raises for files and networks that fail, as ValueError with the path."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, StopIteration) as error:  # StopIteration: JSON without a line
        raise ValueError(f"{path} cannot be read: {str(error.__cause__ or error) or 'no records'}") from error


def find_files(path: str) -> list[str]:
    """The files or the folder that a path with globs and number ranges names, in order. ValueError where none is."""
    files = []
    for pattern in _expand_range(path):
        found = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))
        if not found:
            raise ValueError(f"There is no file or folder {pattern}.")
        files += found
    return files


def _expand_range(path: str) -> list[str]:
    """`{000..123}` as its 124 paths."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None:
        return [path]
    first, last = match.groups()
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [
        expanded
        for number in numbers
        for expanded in _expand_range(path[: match.start()] + number + path[match.end() :])
    ]


def _builder_of(path: str, files: list[str]) -> str:
    if len(files) == 1 and Path(files[0]).is_dir():
        return "imagefolder"
    endings = {Path(file).suffix for file in files}
    builders = {BUILDERS.get(ending) for ending in endings}
    if len(builders) != 1 or None in builders:
        raise ValueError(
            f"{path} names files ending in {sorted(endings)}, expected one folder of images, or files of one kind "
            f"among {sorted(BUILDERS)}."
        )
    return builders.pop()


# Tars of samples (webdataset)


def _open_tars(files: list[str], streaming: bool):
    """An index of the members: the data stay in the tars, and a damaged member costs one record, not the load."""
    from datasets import Dataset, Features, IterableDataset, List, Value

    member = {"extension": Value("string"), "offset": Value("int64"), "size": Value("int64")}
    features = Features({TAR: Value("string"), MEMBERS: List(member)})
    stats = [Path(file).stat() for file in files]
    tars = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats)]  # a changed tar, a new index
    open_index = IterableDataset.from_generator if streaming else Dataset.from_generator
    return open_index(index_tars, gen_kwargs={"tars": tars}, features=features)


def index_tars(tars: list[tuple[str, int, int]]) -> Iterator[dict]:
    """The samples of tars (path, size, time): neighbours whose names are the same up to the first dot."""
    for path, _, _ in tars:
        key, members = None, []
        for name, offset, size in _tar_members(path):
            stem, _, extension = Path(name).name.partition(".")
            if members and (Path(name).parent, stem) != key:
                yield {TAR: path, MEMBERS: members}
                members = []
            key = (Path(name).parent, stem)
            members.append({"extension": extension.lower(), "offset": offset, "size": size})
        if members:
            yield {TAR: path, MEMBERS: members}


def _tar_members(path: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in a tar, up to its end or to where it is cut off."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, member.offset_data, member.size
                tar.members = []  # TarFile keeps all it has seen
    except tarfile.ReadError as error:
        logger.warning("%s is damaged (%s); what comes after is lost.", path, error)


def read_record(row: dict) -> dict:
    """Name -> value of a row, whether it is the index of a tar's members or has a column `json` or neither."""
    record = _read_members(row) if TAR in row else row
    if isinstance(record.get("json"), dict):
        return {**record["json"], **{name: value for name, value in record.items() if name != "json"}}
    return record


def _read_members(row: dict) -> dict:
    """Extension -> content: text and JSON as such, everything else as bytes."""
    record = {}
    with open(row[TAR], "rb") as file:
        for member in row[MEMBERS]:
            file.seek(member["offset"])
            content, extension = file.read(member["size"]), member["extension"]
            if len(content) < member["size"]:
                raise UnreadableRecordError("a tar that is cut off")
            try:
                if extension == "txt":
                    content = content.decode("utf-8")
                elif extension == "json":
                    content = json.loads(content)
            except ValueError as error:
                raise UnreadableRecordError(f"a damaged .{extension}") from error
            record[extension] = content
    return record


# Records of one data set


class Table:
    """A data set with random access, as an endless row of shuffled epochs.

    Args:
        key: what the shuffling depends on.
    """

    def __init__(self, dataset, key: tuple):
        self.rows, self.features, self.key = dataset.with_format("arrow"), _undecoded(dataset.features), key
        self.orders: dict[int, Tensor] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        return class_names(self.features)

    def first_rows(self) -> Iterator[dict]:
        return (self._row(index) for index in range(len(self.rows)))

    def candidates(self, number: int) -> Iterator[tuple[int, dict]]:
        """Place and row `number`, then others by chance, the same in every process, should it not be readable."""
        epoch, place = divmod(number, len(self.rows))
        index = int(self._order(epoch)[place])
        yield index, self._row(index)
        rng = random.Random(repr((*self.key, number)))
        while True:
            index = rng.randrange(len(self.rows))
            yield index, self._row(index)

    def _row(self, index: int) -> dict:
        return self.features.decode_example(self.rows[index].to_pylist()[0])

    def _order(self, epoch: int) -> Tensor:
        """The permutation of an epoch; two are kept, since a step may reach over the end of one."""
        if epoch not in self.orders:
            newest = dict(list(self.orders.items())[-1:])
            self.orders = {**newest, epoch: permutation(len(self.rows), *self.key, epoch)}
        return self.orders[epoch]


class Stream:
    """A data set that is read in order, again and again: this process's share of it, by shards where they suffice."""

    def __init__(self, dataset, process_index: int, num_processes: int):
        from datasets.distributed import split_dataset_by_node

        self.dataset = dataset.decode(False) if dataset.features else dataset
        self.share = split_dataset_by_node(self.dataset, process_index, num_processes)
        self.rows, self.round, self.place = None, 0, 0  # place: how many rows of this round are read

    @property
    def class_names(self) -> tuple[str, ...]:
        return class_names(self.dataset.features or {})

    def first_rows(self) -> Iterator[dict]:
        return iter(self.dataset)

    def candidates(self, number: int) -> Iterator[tuple[int, dict]]:
        """Place and row of the next ones, whatever the number; none if this process's share is empty."""
        while True:
            if self.rows is None:
                self.rows = iter(self.share)
            row = next(self.rows, None)
            if row is not None:
                self.place += 1
                yield self.place - 1, row
            elif self.place:
                self._start(self.round + 1, 0)
            else:
                return

    def state_dict(self) -> dict:
        """The position, for JSON."""
        return {"round": self.round, "place": self.place, "share": self.share.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._start(state["round"], state["place"])
        self.share.load_state_dict(state["share"])

    def _start(self, round_number: int, place: int) -> None:
        self.rows, self.round, self.place = None, round_number, place
        self.share.set_epoch(round_number)  # or a loaded position would be where every later round begins too


def permutation(length: int, *key) -> Tensor:
    """The permutation of `length` numbers that belongs to `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.randperm(length, generator=generator)


def class_names(features: dict) -> tuple[str, ...]:
    """The names behind the numbers of a column `label`, () if there is none."""
    from datasets import ClassLabel

    label = features.get("label")
    return tuple(label.names) if isinstance(label, ClassLabel) else ()


def _undecoded(features):
    """Features of `datasets` whose images stay bytes and paths."""
    from datasets import Features, Image, List

    if isinstance(features, Image):
        return Image(decode=False)
    if isinstance(features, List):
        return List(_undecoded(features.feature))
    if isinstance(features, dict):
        undecoded = {name: _undecoded(feature) for name, feature in features.items()}
        return Features(undecoded) if isinstance(features, Features) else undecoded
    return features
