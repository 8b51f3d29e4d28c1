"""Data sets in files and on the Hub: by number, in shuffled epochs, or in order from a stream of the Hub."""

import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape, glob
from itertools import islice
from pathlib import Path

from .order import OrderInBlocks, key_of, shuffled
from .rows import HubRows, Rows, SlicedRows, open_rows, unfold_json
from .sources import HUB, Source
from .tasks import UnreadableRecordError


logger = logging.getLogger(__name__)

MAX_TRIES = 1000
STREAM_BLOCK = 512  # records of a stream that are shuffled together


def open_table(source: Source, key: tuple, process_index: int = 0, num_processes: int = 1):
    """The `Table` of a source, or the `Stream` of one that is streamed from the Hub.

    Raises ValueError for a source that does not exist, has no records, is damaged as a whole, or cannot be reached.
    """
    if source.is_stream:
        return Stream(load_hub(source), source.path, key, process_index, num_processes)
    table = Table(open_source(source), key, in_blocks=source.streaming)
    for reason, number in list(table.rows.lost.items())[:10]:
        logger.warning("Lost: %s (%d).", reason, number)
    if len(table.rows.lost) > 10:
        logger.warning("Lost: %d more kinds or places in %s.", len(table.rows.lost) - 10, source.path)
    return table


def open_source(source: Source) -> Rows:
    """The records of a source by number. Raises ValueError as `open_table` does."""
    if source.path.startswith(HUB):
        rows = HubRows(load_hub(source), source.path)
    else:
        rows = open_rows(source.path, find_files(source.path), in_place=source.streaming)
        rows = _slice(rows, source.split) if "[" in source.split else rows
    if not len(rows):
        reasons = "; ".join(rows.lost)
        raise ValueError(f"{source.path} cannot be read: {reasons}." if reasons else f"{source.path} has no records.")
    return rows


def load_hub(source: Source):
    """The `datasets.Dataset` of a source, or its IterableDataset if it is streamed. Raises ValueError if it has none."""
    from datasets import load_dataset

    with reading(source.path):
        return load_dataset(source.path.removeprefix(HUB), split=source.split, streaming=source.streaming)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what `datasets` raises for data sets and networks that fail into ValueError with the path."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, StopIteration) as error:
        raise ValueError(f"{path} cannot be read: {str(error.__cause__ or error) or 'no records'}") from error


def find_files(path: str) -> list[str]:
    """The files or the folder that a path with globs and number ranges names, in order. Raises ValueError if there are none."""
    files = []
    for pattern in _expand_range(os.path.expanduser(path)):
        found = [pattern] if Path(pattern).exists() else sorted(glob(_escape_folders(pattern), recursive=True))
        if not found:
            raise ValueError(f"There is no file or folder {pattern}.")
        files += found
    return files


def _escape_folders(pattern: str) -> str:
    """The pattern with existing folders escaped: the `[v2]` of `data[v2]/*.tar` is part of a name."""
    parts = Path(pattern).parts
    for number in range(len(parts) - 1, 0, -1):
        folder = os.path.join(*parts[:number])
        if os.path.isdir(folder):
            return os.path.join(escape(folder), *parts[number:])
    return pattern


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


def _slice(rows: Rows, split: str) -> Rows:
    """The rows of a slice such as train[:1000] or train[90%:]."""
    from datasets import ReadInstruction

    try:
        spec = ReadInstruction.from_spec(split)
        parts = spec.to_absolute({split.partition("[")[0]: len(rows)})
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(f"{split=} is not a slice such as train[:1000] or train[90%:] ({error}).") from error
    return SlicedRows(rows, [range(part.from_ or 0, len(rows) if part.to is None else part.to) for part in parts])


# Records of one data set


class Table:
    """A data set with random access, as an endless series of shuffled epochs.

    Args:
        key: what the shuffling depends on.
        in_blocks: shuffle files or row groups, and the records inside them, for what is best read piece by piece.
    """

    def __init__(self, rows: Rows, key: tuple, in_blocks: bool = False):
        self.rows, self.key, self.in_blocks = rows, key, in_blocks
        self.class_names, self.remark, self.lost = rows.class_names, rows.remark, rows.lost
        self.orders: dict[int, OrderInBlocks] = {}

    def candidates(self, number: int) -> Iterator[int]:
        """Place `number`; then random others, the same in every process, in case it cannot be read."""
        epoch, place = divmod(number, len(self.rows))
        key = key_of(*self.key, epoch)
        rng = random.Random(key_of(*self.key, "instead", number))
        if not self.in_blocks:
            yield shuffled(place, len(self.rows), key)
            while True:
                yield rng.randrange(len(self.rows))
        order = self._order(epoch, key)
        yield order[place]
        block, places = order.block_of(place)
        while True:  # nearby: a jump would open another file
            for _ in range(4):
                yield order[rng.choice(places)]
            block, places = order.block_of(places.stop % len(self.rows))

    def record(self, index: int) -> dict:
        """Column -> value. Raises `UnreadableRecordError`."""
        return unfold_json(self.rows[index])

    def some_records(self, count: int) -> Iterator[dict]:
        """Readable records from all over the data, then from its beginning."""
        spread = dict.fromkeys(number * len(self.rows) // count for number in range(count))
        for index in islice([*spread, *range(min(len(self.rows), MAX_TRIES))], MAX_TRIES):
            try:
                yield self.record(index)
            except UnreadableRecordError:
                continue

    def _order(self, epoch: int, key: int) -> OrderInBlocks:
        """The order of an epoch; two are kept, since a step may extend over the end of one."""
        order = self.orders.get(epoch)
        if order is None:
            order = OrderInBlocks(self.rows.parts, key)
            self.orders = {**dict(list(self.orders.items())[-1:]), epoch: order}
        return order


class Stream:
    """This process's share of a data set that is read from front to back again and again, in shuffled blocks.

    A position is that of the block and the place in it, so a resumed stream reads its block again and continues exactly.
    """

    remark, lost = "", Counter()

    def __init__(self, dataset, path: str, key: tuple, process_index: int = 0, num_processes: int = 1):
        from datasets import ClassLabel
        from datasets.distributed import split_dataset_by_node

        self.path, self.key, self.dataset = path, key, dataset.decode(False) if dataset.features else dataset
        self.share = split_dataset_by_node(self.dataset, process_index, num_processes)
        label = (dataset.features or {}).get("label")
        self.class_names = tuple(label.names) if isinstance(label, ClassLabel) else ()
        self.round, self.num_blocks, self.num_read, self.next_place = 0, 0, 0, 0
        self.rows, self.block = None, []
        self.block_start = self.share.state_dict()

    def candidates(self, number: int) -> Iterator[int]:
        """The number of records read before, whatever `number` is; none if this process's share is empty."""
        while True:
            if self.next_place == len(self.block) and not self._read_block():
                return
            self.next_place += 1
            self.num_read += 1
            yield self.num_read - 1

    def record(self, place: int) -> dict:
        """The record that `candidates` gave last."""
        return unfold_json(self.block[self.next_place - 1])

    def some_records(self, count: int) -> Iterator[dict]:
        """The first records."""
        with reading(self.path):
            yield from map(unfold_json, islice(self.dataset, count))

    def _read_block(self) -> bool:
        """Reads the next block, of this round or the next; returns whether there is one."""
        for _ in range(2):
            if self.rows is None:
                self.rows = iter(self.share)
            self.block_start = self.share.state_dict()
            with reading(self.path):
                self.block, self.next_place = list(islice(self.rows, STREAM_BLOCK)), 0
            random.Random(key_of(*self.key, self.round, self.num_blocks)).shuffle(self.block)
            if self.block:
                self.num_blocks += 1
                return True
            if not self.num_blocks:
                return False
            self._start(self.round + 1)
        return False

    def _start(self, round_number: int) -> None:
        self.rows, self.block, self.next_place = None, [], 0
        self.round, self.num_blocks = round_number, 0
        self.share.set_epoch(round_number)  # otherwise every later round would begin at a loaded position

    def state_dict(self) -> dict:
        """The position, as JSON values."""
        return {
            "round": self.round, "num_blocks": self.num_blocks, "num_read": self.num_read,
            "block_start": self.block_start, "next_place": self.next_place, "has_block": bool(self.block),
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Continues from a position of `state_dict`."""
        self._start(state["round"])
        self.share.load_state_dict(state["block_start"])
        self.num_blocks = state["num_blocks"] - state["has_block"]
        if state["has_block"]:
            self._read_block()
        self.num_read, self.next_place = state["num_read"], state["next_place"]
