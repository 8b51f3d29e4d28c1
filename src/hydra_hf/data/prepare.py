"""What is done to data sets once, before a run."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

from .rows import rows_class
from .shards import open_shards
from .sources import HUB, Source, count_cores
from .tables import find_files, open_source


@dataclass(frozen=True)
class Index:
    """What was indexed of a source; `lost` is reason -> number of records."""

    path: str
    num_records: int
    lost: dict[str, int]

    def __str__(self) -> str:
        lost = [f"lost: {reason} ({number})" for reason, number in self.lost.items()]
        return "\n".join([f"{self.path}: {self.num_records} records", *lost])


def index_sources(sources: list[Source], num_processes: int | None = None) -> Iterator[str | Index]:
    """Indexes the files of sources, several at a time; yields lines that report progress, and each source's index.

    Raises ValueError for a source that cannot be read, or a number of processes below 1.
    """
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"{num_processes=} must be at least 1.")
    num_processes = num_processes or count_cores()
    for source in sources:
        if not source.path.startswith(HUB):
            yield from _index_files(source, num_processes)
        if not source.is_stream:
            rows = open_source(source)
            yield Index(source.path, len(rows), dict(rows.lost))


def _index_files(source: Source, num_processes: int) -> Iterator[str]:
    files = find_files(source.path)
    kind = rows_class(source.path, files, in_place=source.streaming).kind
    if kind == "folder" or len(files) == 1 or num_processes == 1:
        return  # opening the source does everything
    with ProcessPoolExecutor(min(num_processes, len(files)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(open_shards, [file], kind) for file in files]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if done % max(1, len(files) // 20) == 0 or done == len(files):
                yield f"{source.path}: {done} of {len(files)} files"
