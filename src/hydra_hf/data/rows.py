"""Records by number: of files, of a folder of images or clips, of a data set on the Hub."""

import csv
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from .columns import IMAGE_ENDINGS, VIDEO_ENDINGS, by_kind, ends_in
from .shards import Contents, Shard, index_json, open_shards
from .tasks import UnreadableRecordError


KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "tar"}
CACHED_ROWS = 2048  # of row groups that stay in memory


class Rows(Protocol):
    """Records by number. An item is a dict of columns; reading a bad one raises `UnreadableRecordError`.

    Attributes:
        parts: ranges of numbers that are stored together.
        class_names: what the numbers in a column `label` mean, () if there is none.
        lost: reason -> how much of the data has no number, because it is damaged or has no clear place.
        digest: file -> a text that changes with the contents of the file.
        remark: a hint for the case that no column can be used.
    """

    parts: list[range]
    class_names: tuple[str, ...]
    lost: Counter
    digest: dict[str, str]
    remark: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def open_rows(path: str, files: list[str], in_place: bool) -> Rows:
    """The records of local files.

    Args:
        in_place: Parquet is read where it is, by row groups, instead of being copied into the cache.

    Raises ValueError for files that are of several kinds, missing or wholly unreadable.
    """
    rows = rows_class(path, files, in_place)
    return FolderRows(files[0]) if rows is FolderRows else rows(open_shards(files, rows.kind))


def rows_class(path: str, files: list[str], in_place: bool) -> type:
    """The kind of rows that files are read as. Raises ValueError for files of several kinds."""
    if len(files) == 1 and Path(files[0]).is_dir():
        return FolderRows
    endings = {Path(file).suffix.lower() for file in files}
    kinds = {KINDS.get(ending) for ending in endings}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"{path} names files ending in {sorted(endings)}, expected one folder of images, or files of one kind "
            f"among {sorted(KINDS)}."
        )
    return {"tar": TarRows, "json": JsonRows, "parquet": RowGroups if in_place else ParquetRows}[kinds.pop()]


class ShardRows:
    """Records of files of one kind."""

    kind: str
    remark = ""

    def __init__(self, shards: list[Shard]):
        self.shards, self.ends = shards, list(accumulate(map(self.count, shards)))
        self.lost = Counter(
            {f"{shard.path}: {reason}": n for shard in shards for reason, n in shard.contents.lost.items()}
        )
        self.class_names = next((s.contents.class_names for s in shards if s.contents.class_names), ())
        self.tables: dict[int, object] = {}  # the last ones used, by shard

    def count(self, shard: Shard) -> int:
        return shard.contents.num_records

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def parts(self) -> list[range]:
        return [range(start, end) for start, end in zip([0, *self.ends], self.ends)]

    @property
    def digest(self) -> dict[str, str]:
        return {shard.path: shard.contents.digest for shard in self.shards}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"tables": {}}  # a worker opens its own

    def place_of(self, index: int) -> tuple[int, int]:
        """The shard of a record, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index=} of {len(self)} records")
        shard = bisect_right(self.ends, index)
        return shard, index - (self.ends[shard - 1] if shard else 0)

    def row(self, index: int) -> tuple[str, dict]:
        """The path of a record's file, and its row in the cache."""
        shard, place = self.place_of(index)
        if shard not in self.tables:
            if len(self.tables) >= 512:
                del self.tables[next(iter(self.tables))]
            self.tables[shard] = read_arrow(self.shards[shard].rows)
        return self.shards[shard].path, self.tables[shard].slice(place, 1).to_pylist()[0]


def read_arrow(path: Path):
    """The table in an Arrow file, mapped into memory."""
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()


class ParquetRows(ShardRows):
    """Parquet copied into the cache, where any row costs the same."""

    kind = "parquet"

    def __getitem__(self, index: int) -> dict:
        return self.row(index)[1]


class JsonRows(ShardRows):
    """Lines or elements of a list, read where they are."""

    kind = "json"

    def __getitem__(self, index: int) -> dict:
        path, row = self.row(index)
        with open(path, "rb") as file:
            return parse_json(_read(file, row), "a record that is not JSON")


class TarRows(ShardRows):
    """Samples of tars: extension -> content, text and JSON as such, everything else as bytes."""

    kind = "tar"

    def __getitem__(self, index: int) -> dict:
        path, row = self.row(index)
        record = {}
        with open(path, "rb") as file:
            for member in row["members"]:
                content, extension = _read(file, member), member["extension"]
                if extension in ("txt", "caption"):
                    content = decode_text(content, f"a damaged .{extension}")
                elif extension == "json":
                    content = json_value(content, "a damaged .json")
                record[extension] = content
        return record


class RowGroups(ShardRows):
    """Parquet read where it is. The last row groups stay in memory, so neighbours are cheap and jumps are not."""

    kind = "row groups"

    def __init__(self, shards: list[Shard]):
        self.groups = {
            shard.path: list(accumulate(read_arrow(shard.rows)["num_rows"].to_pylist())) for shard in shards
        }
        super().__init__(shards)

    def count(self, shard: Shard) -> int:
        return next(reversed(self.groups[shard.path]), 0)

    @property
    def parts(self) -> list[range]:
        starts = [0, *self.ends]
        return [
            range(start + first, start + end)
            for start, shard in zip(starts, self.shards)
            for first, end in zip([0, *self.groups[shard.path]], self.groups[shard.path])
        ]

    def __getitem__(self, index: int) -> dict:
        shard, place = self.place_of(index)
        ends = self.groups[self.shards[shard].path]
        group = bisect_right(ends, place)
        first = ends[group - 1] if group else 0
        if (shard, group) not in self.tables:
            self._forget(ends[group] - first)
            self.tables[shard, group] = read_row_group(self.shards[shard].path, group)
        if self.tables[shard, group] is None:
            raise UnreadableRecordError("a damaged row group")
        return self.tables[shard, group].slice(place - first, 1).to_pylist()[0]

    def _forget(self, num_rows: int) -> None:
        """Forgets the oldest groups until there is room for `num_rows` more rows."""
        while self.tables and num_rows + sum(0 if t is None else len(t) for t in self.tables.values()) > CACHED_ROWS:
            del self.tables[next(iter(self.tables))]


def read_row_group(path: str, group: int):
    """The table of a row group, None for a damaged one."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read_row_group(group)
    except (OSError, ValueError, MemoryError):  # pyarrow's errors are of these kinds
        return None


def _read(file, place: dict) -> bytes:
    file.seek(place["offset"])
    content = file.read(place["size"])
    if len(content) < place["size"]:
        raise UnreadableRecordError("a file that is shorter than its index")
    return content


def decode_text(content: bytes, reason: str) -> str:
    """Text in UTF-8, or in UTF-16 with a byte order mark, as some tools of Windows write it."""
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UnreadableRecordError(reason) from error


def json_value(content: bytes, reason: str):
    """The value of a JSON text. Raises UnreadableRecordError with `reason`."""
    try:
        return json.loads(decode_text(content, reason))
    except (ValueError, RecursionError) as error:
        raise UnreadableRecordError(reason) from error


def parse_json(content: bytes, reason: str) -> dict:
    """The record that a JSON text holds. Raises UnreadableRecordError, with `reason` if it is not JSON."""
    record = json_value(content, reason)
    if not isinstance(record, dict):
        raise UnreadableRecordError("a record that is not a dict of columns")
    return record


def unfold_json(record: dict) -> dict:
    """The record with the fields of its column `json`; a column takes precedence over a field of the same name."""
    fields = record.get("json")
    if not isinstance(fields, dict):
        return record
    return fields | {name: value for name, value in record.items() if name != "json"}


# Folders of images or clips


class FolderRows:
    """The images and clips of a folder. Captions come from metadata.jsonl or metadata.csv (`file_name` and columns), from a .txt
    file with the name of the image, or from the name of the folder that an image is in, if all images are in folders of
    one depth.
    """

    kind = "folder"

    def __init__(self, folder: str):
        self.folder, self.lost, self.remark, self.class_names = folder, Counter(), "", ()
        self.images, self.texts, metadata, others = list_images(folder, IMAGE_ENDINGS + VIDEO_ENDINGS)
        self.labels, self.metadata = [], []
        if metadata:
            self.metadata = [row for path in metadata for row in self._read_metadata(path)]
        elif not self.texts:
            self._find_classes()
        if not self.images and not self.metadata:
            found = f"; there are {len(others)} other files, such as {others[0]}" if others else ""
            images, clips = (
                ", ".join(f".{ending}" for ending in endings) for endings in (IMAGE_ENDINGS, VIDEO_ENDINGS)
            )
            raise ValueError(f"{folder} has no records: expected images ({images}) or clips ({clips}){found}.")

    def __len__(self) -> int:
        return len(self.metadata or self.images)

    @property
    def parts(self) -> list[range]:
        return [range(len(self))]

    @property
    def digest(self) -> dict[str, str]:
        import hashlib

        names = repr((self.images, sorted(self.texts.items()), self.metadata, self.class_names))
        return {self.folder: hashlib.blake2b(names.encode(errors="surrogateescape"), digest_size=16).hexdigest()}

    def __getitem__(self, index: int) -> dict:
        if self.metadata:
            row = dict(self.metadata[index])
            return by_kind(row.pop("file_name")) | row
        image = self.images[index]
        if self.texts:
            path = self.texts.get(image)
            content = None if path is None else Path(self.folder, path).read_bytes()
            return by_kind(image) | {"txt": None if content is None else decode_text(content, "a damaged .txt")}
        return by_kind(image) | ({"label": self.labels[index]} if self.class_names else {})

    def _read_metadata(self, path: str) -> list[dict]:
        """Rows with `file_name` relative to the folder; others are lost."""
        rows = []
        file_folder = os.path.dirname(path)
        for row in read_table(Path(self.folder, path), self.lost):
            if isinstance(row.get("file_name"), str):
                rows.append(row | {"file_name": os.path.join(file_folder, row["file_name"])})
            else:
                self.lost[f"{self.folder}/{path}: rows without a file_name"] += 1
        listed = {os.path.normpath(row["file_name"]) for row in rows}
        unlisted = [image for image in self.images if os.path.dirname(image) == file_folder and image not in listed]
        if unlisted:
            self.lost[f"{self.folder}/{path}: images that it does not name"] += len(unlisted)
        return rows

    def _find_classes(self) -> None:
        folders = [os.path.dirname(image) for image in self.images]
        names = sorted({os.path.basename(folder) for folder in folders})
        if len(names) < 2 or len({folder.count(os.sep) for folder in folders}) > 1 or "" in folders:
            return
        if unlike := [name for name in names if not names_a_class(name)]:
            self.remark = f" The names of its folders, such as {unlike[0]!r}, are not taken for captions."
            return
        numbers = {name: number for number, name in enumerate(names)}
        self.class_names = tuple(name.replace("_", " ") for name in names)
        self.labels = [numbers[os.path.basename(folder)] for folder in folders]


NO_CLASS = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev|eval|images?|imgs?|pictures?|photos?|jpegimages|data|dataset|"
    r"videos?|clips?|"
    r"split|part|shard|chunk|batch|folder|class|unlabell?ed|n)?[-_ .]?[0-9_-]*",
    flags=re.IGNORECASE,
)


def names_a_class(folder: str) -> bool:
    """Whether a folder's name may say what is in its images: not "train2017", "images", "0012", "n01440764"."""
    return not NO_CLASS.fullmatch(folder)


def list_images(
    folder: str, endings: tuple[str, ...] = IMAGE_ENDINGS
) -> tuple[list[str], dict[str, str], list[str], list[str]]:
    """Below a folder, relative to it: its images, or files with other endings; the .txt files of those that have one, metadata
    files, other files."""
    images, texts, metadata, others = [], {}, [], []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(parent, folder).removeprefix(".").removeprefix(os.sep)
        names = sorted(name for name in names if not name.startswith("."))
        stems = {name[:-4].lower(): name for name in names if name.lower().endswith(".txt")}
        for name in names:
            path = os.path.join(relative, name)
            if ends_in(name, endings):
                images.append(path)
                if (text := stems.get(os.path.splitext(name)[0].lower())) is not None:
                    texts[path] = os.path.join(relative, text)
            elif name in ("metadata.jsonl", "metadata.csv"):
                metadata.append(path)
            else:
                others.append(path)
    return images, texts, metadata, others


def read_table(path: Path, lost: Counter) -> list[dict]:
    """The rows of a CSV or JSONL file that can be read; the others are counted in `lost`."""
    if path.suffix == ".csv":
        try:
            return list(csv.DictReader(decode_text(path.read_bytes(), "").splitlines()))
        except (UnreadableRecordError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read: expected CSV in UTF-8.") from error
    rows, contents = [], Contents()
    _, batches = index_json(str(path), contents)
    with open(path, "rb") as file:
        for place in (place for batch in batches for place in batch.to_pylist()):
            try:
                rows.append(parse_json(_read(file, place), "records that are not JSON"))
            except UnreadableRecordError as error:
                lost[f"{path}: {error}"] += 1
    lost.update({f"{path}: {reason}": number for reason, number in contents.lost.items()})
    return rows


# The Hub, and parts of data


class HubRows:
    """A data set of `datasets`."""

    lost, remark = Counter(), ""

    def __init__(self, dataset, path: str):
        from datasets import ClassLabel

        label = dataset.features.get("label")
        self.class_names = tuple(label.names) if isinstance(label, ClassLabel) else ()
        self.digest = {path: dataset._fingerprint}
        self.rows = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parts(self) -> list[range]:
        return [range(len(self))]

    def __getitem__(self, index: int) -> dict:
        return self.rows[index].to_pylist()[0]


class SlicedRows:
    """Some ranges of rows."""

    def __init__(self, rows: Rows, ranges: Sequence[range]):
        self.rows, self.ranges, self.ends = rows, ranges, list(accumulate(map(len, ranges)))
        self.class_names, self.lost, self.remark = rows.class_names, rows.lost, rows.remark
        self.digest = rows.digest

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def parts(self) -> list[range]:
        cut = []
        for start, wanted in zip([0, *self.ends], self.ranges):
            for part in self.rows.parts:
                first, end = max(part.start, wanted.start), min(part.stop, wanted.stop)
                if first < end:
                    cut.append(range(start + first - wanted.start, start + end - wanted.start))
        return cut

    def __getitem__(self, index: int) -> dict:
        place = bisect_right(self.ends, index)
        return self.rows[self.ranges[place][index - self.ends[place]]]
