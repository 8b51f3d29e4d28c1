"""Where the records of a file are, kept in the cache: an index of a tar or a JSON file, or a copy of a Parquet file that can
be read by number. Each file has its own, so processes share the work, and a damaged file costs only what is damaged in it.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath

from hydra_hf.files import write_file, write_text

from .columns import IMAGE_ENDINGS, VIDEO_ENDINGS


logger = logging.getLogger(__name__)

FORMAT = 2  # of what is kept: changing it makes every file be indexed again
BATCH = 65_536  # records of an index that are written together
HEAD = 4096  # bytes of every member that its digest covers
END_OF_TAR = tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE  # zeros that may end a tar
KNOWN_EXTENSIONS = frozenset((*IMAGE_ENDINGS, *VIDEO_ENDINGS, "txt", "caption", "json"))


@dataclass
class Contents:
    """What is known of one file: its records, a digest of them, what is lost in it, and names of classes."""

    num_records: int = 0
    digest: str = ""
    lost: Counter = field(default_factory=Counter)  # reason -> count
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """A file of records, and the Arrow file in the cache with a row for each of them."""

    path: str
    rows: Path
    contents: Contents


def cache_folder() -> Path:
    """A folder in the cache of `datasets`, so that HF_DATASETS_CACHE and HF_HOME decide where it is."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "hydra_hf"


def open_shards(files: list[str], kind: str) -> list[Shard]:
    """The shards of `files`, each indexed first if it is not yet. Any number of processes may do so at the same time,
    on any machines that share the cache: they divide the files among themselves, and none waits for all the work of another.

    Raises ValueError for a file that cannot be opened.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if find_shard(file, kind) is None]
    start = os.getpid() % max(1, len(missing))  # processes begin at different files
    progress = Progress(missing, kind)
    for timeout in (0, 20):  # first the files that nobody is indexing, then those that others are
        for file in missing[start:] + missing[:start]:
            while not _index(file, kind, timeout) and timeout:
                progress.show(file)
            progress.show(file)
    return [find_shard(file, kind) for file in files]


def _index(file: str, kind: str, timeout: float) -> bool:
    """Indexes a file unless another process holds it for longer than `timeout` seconds; returns whether it is indexed now."""
    from filelock import FileLock, Timeout

    if find_shard(file, kind) is not None:
        return True
    try:
        with FileLock(f"{_name_of(file, kind)}.lock", timeout=timeout):
            if find_shard(file, kind) is None:
                create_shard(file, kind)
    except Timeout:
        return False
    return True


class Progress:
    """A line in the log from time to time while files are indexed."""

    seconds = 20

    def __init__(self, files: list[str], kind: str):
        self.files, self.kind, self.last = files, kind, time.monotonic()

    def show(self, file: str) -> None:
        """Logs a line if the last one is `seconds` old."""
        if time.monotonic() - self.last < self.seconds:
            return
        self.last = time.monotonic()
        num_done = sum(find_shard(file, self.kind) is not None for file in self.files)
        logger.warning(
            "%d of %d files are indexed, now %s. `hydra prepare index` does this beforehand, in parallel.",
            num_done, len(self.files), file,
        )  # fmt: skip


def _name_of(file: str, kind: str) -> Path:
    """The path, without suffix, of a file in the cache; a changed file has another one.

    Raises ValueError for a file that cannot be read.
    """
    try:
        stat = os.stat(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    key = repr((FORMAT, kind, os.path.abspath(file), stat.st_size, stat.st_mtime_ns))
    return cache_folder() / hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def find_shard(file: str, kind: str) -> Shard | None:
    """The shard of a file that is indexed, None if it is not."""
    name = _name_of(file, kind)
    try:
        contents = json.loads(name.with_suffix(".json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    contents |= {"lost": Counter(contents["lost"]), "class_names": tuple(contents["class_names"])}
    return Shard(path=file, rows=name.with_suffix(".arrow"), contents=Contents(**contents))


def create_shard(file: str, kind: str) -> None:
    """Writes the rows of a file into the cache, then its contents, whose presence says that the rows are complete."""
    import pyarrow

    contents = Contents()
    schema, batches = KINDS[kind](file, contents)

    def write(temporary: Path) -> None:
        with pyarrow.ipc.new_file(str(temporary), schema) as writer:
            for batch in batches:
                contents.num_records += batch.num_rows
                writer.write(batch)

    name = _name_of(file, kind)
    try:
        write_file(name.with_suffix(".arrow"), write)
    except OSError as error:
        raise ValueError(f"{file} cannot be indexed in {name.parent}: {error}.") from error
    write_text(name.with_suffix(".json"), json.dumps(vars(contents)))


def _batches(rows: Iterator[dict], schema) -> Iterator:
    """Dicts as record batches."""
    import pyarrow

    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield pyarrow.RecordBatch.from_pylist(batch, schema)
            batch = []
    if batch:
        yield pyarrow.RecordBatch.from_pylist(batch, schema)


# Parquet


def copy_parquet(path: str, contents: Contents) -> tuple:
    """All rows that can be read; a damaged row group is lost."""
    import pyarrow

    file = _open_parquet(path, contents)
    if file is None:
        return pyarrow.schema([]), iter(())

    fields = [f.with_type(f.type.value_type) if _is_dictionary(f) else f for f in file.schema_arrow]
    schema = pyarrow.schema([f.remove_metadata() for f in fields])

    def read() -> Iterator:
        for group in range(file.num_row_groups):
            try:
                batches = file.read_row_group(group).cast(schema).combine_chunks().to_batches()
            except (OSError, ValueError, MemoryError) as error:  # pyarrow's errors are of these kinds
                num_rows = file.metadata.row_group(group).num_rows
                contents.lost[f"rows of damaged row groups ({_short(error)})"] += num_rows
            else:
                yield from batches

    return schema, read()


def _is_dictionary(field) -> bool:
    """Whether a column is dictionary-encoded, with a dictionary that an Arrow file could not extend."""
    import pyarrow

    return pyarrow.types.is_dictionary(field.type)


def index_row_groups(path: str, contents: Contents) -> tuple:
    """How many rows each row group has: for Parquet that stays where it is."""
    import pyarrow

    schema = pyarrow.schema({"num_rows": pyarrow.int64()})
    file = _open_parquet(path, contents)
    groups = [] if file is None else [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return schema, _batches(({"num_rows": num_rows} for num_rows in groups), schema)


def _open_parquet(path: str, contents: Contents):
    """The file, with its footer as digest; None if it is not a Parquet file."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = [file.metadata.row_group(i).to_dict() for i in range(file.num_row_groups)]
    except (OSError, ValueError) as error:
        contents.lost[f"not a Parquet file ({_short(error)})"] += 1
        return None
    contents.digest = hashlib.blake2b(repr(groups).encode(), digest_size=16).hexdigest()
    contents.class_names = _class_names(file.schema_arrow)
    return file


def _class_names(schema) -> tuple[str, ...]:
    """The names behind the numbers of a column `label`, as `datasets` writes them; () if there are none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = features.get("info", {}).get("features", {}).get("label", {}).get("names", ())
        return tuple(map(str, names))
    except (ValueError, AttributeError, TypeError):
        return ()


def _short(error: BaseException) -> str:
    """The first line of an error."""
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


# JSON: a list of records, or one record per line


def index_json(path: str, contents: Contents) -> tuple:
    """Where each record is; whether it can be read turns out when it is."""
    import pyarrow

    schema = pyarrow.schema({"offset": pyarrow.int64(), "size": pyarrow.int64()})
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        contents.lost["text in UTF-16, expected UTF-8"] += 1
        return schema, iter(())
    is_list = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    places = _list_places(path, contents) if is_list else _line_places(path, contents)
    return schema, _batches(({"offset": offset, "size": size} for offset, size in places), schema)


def _line_places(path: str, contents: Contents) -> Iterator[tuple[int, int]]:
    """Offset and size of every line that is not blank."""
    digest, offset = hashlib.blake2b(digest_size=16), 0
    with open(path, "rb") as file:
        for line in file:
            digest.update(line)
            start = 3 if offset == 0 and line.startswith(b"\xef\xbb\xbf") else 0
            if line[start:].strip():
                yield offset + start, len(line) - start
            offset += len(line)
    contents.digest = digest.hexdigest()


SPACE = re.compile(r"\s*")
NEXT_RECORD = re.compile(r"\}\s*,\s*(?=\{)")


def _list_places(path: str, contents: Contents) -> Iterator[tuple[int, int]]:
    """Offset and size of every element of one list; after a malformed one, it resumes after the next `},{`."""
    content = Path(path).read_bytes()
    contents.digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    text = content.decode("latin-1")  # one character per byte, so the punctuation of JSON keeps its place
    decoder, position = json.JSONDecoder(strict=False), text.index("[") + 1
    while True:
        position = SPACE.match(text, position).end()
        try:
            if text[position : position + 1] == "]" and not text[position + 1 :].strip():
                return
            _, end = decoder.raw_decode(text, position)
            following = SPACE.match(text, end).end()
            if text[following : following + 1] not in (",", "]"):
                raise ValueError("no comma")
            yield position, end - position
            position = following + (text[following] == ",")
        except (ValueError, RecursionError):
            found = NEXT_RECORD.search(text, position)
            contents.lost["malformed places in a JSON list" if found else "a JSON list that is cut off"] += 1
            if found is None:
                return
            position = found.end()


# Tars of samples (webdataset)


def index_tar(path: str, contents: Contents) -> tuple:
    """The members of each sample."""
    import pyarrow

    member = {"extension": pyarrow.string(), "offset": pyarrow.int64(), "size": pyarrow.int64()}
    schema = pyarrow.schema({"members": pyarrow.list_(pyarrow.struct(member))})
    samples = group_members(tar_members(path, contents), contents.lost)
    rows = ([dict(zip(member, part)) for part in sample] for sample in samples)
    return schema, _batches(({"members": members} for members in rows), schema)


def tar_members(path: str, contents: Contents) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every file in a tar; bytes between members that should not be there are counted as lost."""
    digest, size, lost = hashlib.blake2b(digest_size=16), os.path.getsize(path), contents.lost
    with open(path, "rb") as file:
        end, last = 0, None  # of the last member
        for member in _headers(path):
            if member.offset > end:
                lost[_hole(end, member.offset)] += 1
                last = _checked(file, last, lost)
            if last is not None:
                yield last
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            last = None
            if member.isfile():
                last = (member.name, member.offset_data, member.size)
                file.seek(member.offset_data)
                digest.update(repr((member.name, member.size, member.mtime)).encode(errors="surrogateescape"))
                digest.update(file.read(min(member.size, HEAD)))
            elif not member.isdir():
                lost["links and other members without data"] += 1
        file.seek(end)
        rest = size - end
        if rest < 0 and last is not None and last[1] + last[2] > size:
            lost["members that are cut off at the end of a tar"] += 1
            last = None
        elif rest > END_OF_TAR or file.read(max(rest, 0)).strip(b"\0"):
            lost[_hole(end, size) if end else "not a tar file"] += 1
            last = _checked(file, last, lost)
        elif end and rest < tarfile.BLOCKSIZE:  # a complete tar ends in blocks of zeros
            lost[f"the end of a tar, after byte {end}"] += 1
        if last is not None:
            yield last
    contents.digest = digest.hexdigest()


def _headers(path: str) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar; what is not a header is skipped, block by block."""
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            while (member := _next_header(tar, size)) is not None:
                yield member
                tar.members = []  # TarFile would keep all it has seen
    except tarfile.ReadError:  # empty, or no header in all of it
        return


def _next_header(tar: tarfile.TarFile, size: int) -> tarfile.TarInfo | None:
    while True:
        try:
            return tar.next()
        except (tarfile.TarError, ValueError, OverflowError, IndexError, MemoryError):  # a header that misleads
            if tar.offset >= size:
                return None
            tar.offset += tarfile.BLOCKSIZE


def _hole(start: int, end: int) -> str:
    return f"{end - start} damaged bytes from byte {start}"


def _checked(file, member: tuple | None, lost: Counter) -> tuple | None:
    """The member in front of a hole; None if the hole reaches into it."""
    if member is None:
        return None
    file.seek(member[1])
    content = file.read(member[2])
    if content and not content[-8:].strip(b"\0"):
        lost["members that end in a hole"] += 1
        return None
    return member


def group_members(members: Iterator[tuple[str, int, int]], lost: Counter) -> Iterator[list[tuple[str, int, int]]]:
    """Members (name, offset, size) to samples of (extension, offset, size).

    As in webdataset, neighbours whose names are the same up to the first dot are a sample, and what follows the dot is
    the extension. Where that would merge samples, other rules apply: a number after a dot belongs to the name
    (`v1.0.png`); if no extension of a group is a known one, the last dot counts (`a.final.png`); and members of one
    name and extension, in regular turns, are samples of their own. What has no clear place even then is lost, and counted.
    """
    parts = []
    for name, offset, size in members:
        path = PurePosixPath(name)
        stem, extension = split_name(path.name)
        if path.name.startswith(".") or not extension:
            lost["members whose name is hidden or has no extension"] += 1
            continue
        parts.append((f"{path.parent}/{stem}".lower(), extension.lower(), offset, size))
        if len(parts) > 1 and parts[-2][0] != parts[-1][0]:
            yield from _samples(parts[:-1], lost)
            del parts[:-1]
    yield from _samples(parts, lost)


def split_name(name: str) -> tuple[str, str]:
    """Name and extension, divided at the first dot that no number follows: `22.05.seg.png` is ("22.05", "seg.png")."""
    pieces = name.split(".")
    place = 1
    while place < len(pieces) - 1 and pieces[place][:1].isdigit():
        place += 1
    return ".".join(pieces[:place]), ".".join(pieces[place:])


def _samples(parts: list[tuple[str, str, int, int]], lost: Counter) -> Iterator[list[tuple[str, int, int]]]:
    """The samples among neighbours (stem, extension, offset, size) of one stem."""
    if not any(extension in KNOWN_EXTENSIONS for _, extension, _, _ in parts):
        parts = [
            (f"{stem}.{extension.rpartition('.')[0]}", extension.rpartition(".")[2], *place)
            for stem, extension, *place in parts
        ]
    for _, group in groupby(parts, key=lambda part: part[0]):
        sample = [part[1:] for part in group]
        period = len({extension for extension, _, _ in sample})
        turns = [sample[start : start + period] for start in range(0, len(sample), period)]
        if all(len({extension for extension, _, _ in turn}) == period for turn in turns):
            yield from turns
        else:
            lost["members of one name, in no clear order"] += len(sample)


KINDS: dict[str, Callable[[str, Contents], tuple]] = {
    "tar": index_tar,
    "json": index_json,
    "parquet": copy_parquet,
    "row groups": index_row_groups,
}
