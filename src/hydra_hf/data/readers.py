"""Images, captions and conversations of several data sets: sample n of a task is the same whoever reads it."""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from hydra_hf.modeling import HydraImageProcessor, HydraProcessor, HydraVideoProcessor

from .latents import StoredLatents
from .order import key_of
from .painting import PROMPT_COLUMN, known_failures, path_below, target_columns, without_target
from .prompts import PROMPTS, choose_prompt, read_prompts
from .records import Columns, RecordReader, find_columns, one_record
from .sample import Sample
from .sources import HUB, Source
from .sources import parse_source as parse_source  # callers import both sources and readers from here
from .tables import MAX_TRIES, Stream, Table, find_files, open_table
from .tasks import TASKS, UnreadableRecordError, images_of


logger = logging.getLogger(__name__)

BLOCK = 1024  # numbers over which the shares of sources are exact
READING = Lock()  # files are read by one thread at a time, images decoded by several
NUM_PROBES = 16  # rows whose columns are looked at: one sample of a tar may lack some


class SourceMix:
    """Maps numbers to records of weighted sources: a function of the seed and the number, or, where a source is streamed,
    the next record of this process.

    Shares are exact over 1024 numbers. Every source is read in epochs, each a permutation of its records.

    Args:
        accepts: whether records of a source with these columns can be used.

    Raises ValueError for sources that cannot be read, are empty or not accepted, or get none of 1024 numbers.
    """

    def __init__(
        self,
        sources: tuple[Source, ...],
        image_processor: HydraImageProcessor,
        seed: int,
        accepts: Callable[[Source, Columns], bool],
        process_index: int = 0,
        num_processes: int = 1,
        video_processor: HydraVideoProcessor | None = None,
    ):
        self.sources, self.seed, self.num_processes = sources, seed, num_processes
        self.num_skipped: dict[str, int] = defaultdict(int)  # "path: reason" -> records
        self.counts = _counts_in_block(sources)
        self.tables, self.readers = [], []
        if len({source.latents is None for source in sources}) > 1:
            raise ValueError(f"Some of {[source.path for source in sources]} have latents and some do not, expected one"
                             " kind for a task.")  # fmt: skip
        for index, source in enumerate(sources):
            table = open_table(source, (seed, index), process_index, num_processes)
            columns = _columns_of(source, table)
            if not accepts(source, columns):
                raise ValueError(
                    f"{source.path} has the columns {columns.names}: no {needs(source)} for the task "
                    f"{source.task!r}, see the names in hydra_hf.data.columns.{table.remark}"
                )
            logger.info("%s: %s.", source.path, columns)
            self.num_skipped.update(table.lost)
            self.tables.append(table)
            self.readers.append(_record_reader(source, columns, image_processor, video_processor))

    def place_of(self, number: int) -> tuple[int, int]:
        """The source of a number, and which of the source's own numbers it is."""
        block, place = divmod(number, BLOCK)
        return _places_in_block(self.seed, block, tuple(self.counts))[place]

    def read(self, number: int, convert: Callable[[RecordReader, dict, int], Any]) -> Any:
        """What `convert` makes of the number's record and its place in the source, or of the next candidate that it can read.

        None if this process's share of a stream is empty. Raises ValueError if nothing in 1000 tries can be read.
        """
        return next(self.readable(number, convert), None)

    def readable(self, number: int, convert: Callable[[RecordReader, dict, int], Any]) -> Generator:
        """What `read` gives, and then what it would give if that could not be read: for whoever refuses one by throwing an
        `UnreadableRecordError` in."""
        index, own_number = self.place_of(number)
        table, place = self.tables[index], None
        for place in islice(table.candidates(own_number), MAX_TRIES):
            try:
                with one_record():
                    with READING:
                        record = table.record(place)
                    value = convert(self.readers[index], record, place)
                yield value
            except UnreadableRecordError as error:
                self._skip(self.sources[index], place, error)
        if place is not None:
            raise ValueError(
                f"{self.sources[index].path}: none of {MAX_TRIES} records can be read; {dict(self.num_skipped)}."
            )

    def _skip(self, source: Source, place: int, error: UnreadableRecordError) -> None:
        key = f"{source.path}: {error}"
        with READING:
            self.num_skipped[key] += 1
        if self.num_skipped[key] == 1:
            reason = f"{error} ({error.__cause__})" if error.__cause__ else error
            logger.warning("Record %d of %s is skipped, and others like it will be: %s.", place, source.path, reason)

    @property
    def is_streaming(self) -> bool:
        return any(source.is_stream for source in self.sources)

    def state_dict(self) -> dict:
        """The positions of this process's streams, as JSON values; {} without streams."""
        if not self.is_streaming:
            return {}
        streams = {index: stream.state_dict() for index, stream in self._streams().items()}
        return {"num_processes": self.num_processes, "streams": streams}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if the state is of other sources or of another number of processes."""
        streams = self._streams()
        saved = state.get("streams", {})
        if saved.keys() != streams.keys() or (saved and state["num_processes"] != self.num_processes):
            raise ValueError(
                f"The position {state} is not one of the streams of {[source.path for source in self.sources]} in "
                f"{self.num_processes} processes; a stream resumes only as it was divided."
            )
        for index, stream in streams.items():
            stream.load_state_dict(saved[index])

    def _streams(self) -> dict[str, Stream]:
        return {str(index): table for index, table in enumerate(self.tables) if isinstance(table, Stream)}


class TaskReader(SourceMix):
    """Sample `n` of one task; a function of the seed and n, but in order where a source is streamed.

    Args:
        max_length: positions of the language model; a sample of more tokens, images included, is skipped whole.
        drop_prompt: share of empty prompts, for guidance, of a task that drops them.
    """

    def __init__(
        self,
        sources: tuple[Source, ...],
        processor: HydraProcessor,
        seed: int,
        *,
        max_length: int,
        drop_prompt: float = 0.0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        tasks = {source.task for source in sources}
        if len(tasks) != 1:
            raise ValueError(f"Got sources of the tasks {sorted(tasks)}, expected one task.")
        self.task, self.drop_prompt = tasks.pop(), drop_prompt
        self.processor, self.max_length = processor, max_length
        video_processor = None if processor.video_token is None else processor.video_processor
        if TASKS[self.task].num_videos:
            check_reads_clips(self.task, video_processor)
        super().__init__(
            sources,
            processor.image_processor,
            seed,
            fits,
            process_index,
            num_processes,
            video_processor=video_processor,
        )
        for source, table, reader in zip(sources, self.tables, self.readers):
            check_painting(source, table, reader)

    def __getitem__(self, number: int) -> Sample | None:
        """None if this process's share of a stream is empty."""
        return self.batch([number])[0]

    def batch(self, numbers: Sequence[int]) -> list[Sample | None]:
        """The samples of some numbers, their chats encoded together."""
        candidates = [self.readable(number, partial(self._sample, number)) for number in numbers]
        samples = [next(candidate, None) for candidate in candidates]
        open_places = [place for place, sample in enumerate(samples) if sample is not None]
        while open_places:
            encodings = self._encode([samples[place] for place in open_places])
            refused = []
            for place, encoding in zip(open_places, encodings):
                if isinstance(encoding, UnreadableRecordError):
                    samples[place] = candidates[place].throw(encoding)
                    refused.append(place)
                else:
                    samples[place] = replace(samples[place], encoding=encoding)
            open_places = refused
        return samples

    @property
    def latent_channels(self) -> int | None:
        """C of the latents that replace pixels, None if there are pixels."""
        latents = self.readers[0].latents
        return None if latents is None else latents.latent_channels

    def _sample(self, number: int, reader: RecordReader, record: dict, place: int) -> Sample:
        rng = random.Random(key_of(self.seed, "sample", number))
        if reader.prompts:
            # numbers keep counting through epochs, so each epoch chooses again
            prompt = choose_prompt(self.task, reader.prompts, self.seed, number)
            record = record | {PROMPT_COLUMN: prompt}
        sample = reader.sample(record, self.task, rng, place)
        if TASKS[self.task].drops_prompt and rng.random() < self.drop_prompt:
            given = images_of(sample.messages[:1]) if rng.random() < 0.5 else []
            empty = {"role": "user", "content": [*given, {"type": "text", "text": ""}]}
            return replace(sample, messages=[empty, *sample.messages[1:]])
        return sample

    def _encode(self, samples: list[Sample]) -> list[dict[str, Tensor] | UnreadableRecordError]:
        """The encoding of each sample, or why it has none."""
        try:
            with one_record():
                encodings = self.processor.encode_each([sample.messages for sample in samples])
        except UnreadableRecordError as error:  # of one of them
            return [error] if len(samples) == 1 else [self._encode([sample])[0] for sample in samples]
        too_long = UnreadableRecordError(f"more than max_length={self.max_length} tokens")
        return [too_long if len(encoding["input_ids"]) > self.max_length else encoding for encoding in encodings]


def create_readers(
    sources: tuple[Source, ...],
    tasks: dict[str, int],
    processor: HydraProcessor,
    seed: int,
    *,
    max_length: int,
    drop_prompt: float = 0.0,
    process_index: int = 0,
    num_processes: int = 1,
) -> dict[str, TaskReader]:
    """A reader for every task that has samples; sources of other tasks are not opened.

    Raises ValueError for a task without a source.
    """
    readers = {}
    for task in (task for task, count in tasks.items() if count):
        own = tuple(source for source in sources if source.task == task)
        if not own:
            raise ValueError(f"There is no data for the task {task!r}, expected a source such as {task}=PATH.")
        readers[task] = TaskReader(
            own, processor, seed, max_length=max_length,
            drop_prompt=drop_prompt, process_index=process_index, num_processes=num_processes,
        )  # fmt: skip
    return readers


def check_reads_clips(task: str, video_processor: HydraVideoProcessor | None) -> None:
    """Raises ValueError for a task with clips that the processor, or this Python, cannot read."""
    if video_processor is None:
        raise ValueError(
            f"The task {task!r} has clips, but the processor has no video_processor: its model reads images alone."
        )
    if find_spec("av") is None:
        raise ValueError(f"The task {task!r} has clips, which are read with PyAV: pip install hydra_hf[video].")


def check_painting(source: Source, table: Table | Stream, reader: RecordReader) -> None:
    """Raises ValueError, before any sample is read, that names the first images of a source without a target.

    Where records hold their targets, the column has to exist. Images that `hydra prepare unimrg` names as failed may lack
    theirs: they are skipped and counted.
    """
    size, patch_size = source.condition_image_size, reader.image_processor.patch_size
    if size is not None and size < patch_size:
        raise ValueError(f"{source.path}: condition_image_size={size} must be at least {patch_size=}.")
    name = TASKS[source.task].target
    if name and source.targets is None and not {*target_columns(name)} & {*reader.columns.names}:
        raise ValueError(
            f"{source.path} has the columns {reader.columns.names}, expected one of {target_columns(name)} with what is"
            f" painted, or targets=FOLDER, such as `hydra prepare unimrg` makes."
        )
    if source.targets is None:
        return
    if not reader.targets.is_dir():
        raise ValueError(f"{source.path}: there is no folder targets={source.targets}.")
    failed = known_failures(reader.targets)
    paths = (path for path in _image_paths(source, table, reader) if path not in failed)
    if missing := without_target(paths, reader.targets):
        raise ValueError(
            f"{source.path}: {len(missing)} images have no target in {source.targets}, such as {', '.join(missing[:3])}:"
            f" let `hydra prepare unimrg` make them, or leave the images out."
        )


def _image_paths(source: Source, table: Table, reader: RecordReader) -> Iterator[str]:
    """Paths of the images of all records with one image, relative to the folder of images.

    Raises ValueError for an image that is not below it.
    """
    for index in range(len(table.rows)):
        try:
            with one_record():
                images = reader.images(table.record(index))
        except UnreadableRecordError:
            continue  # it will be skipped, and counted
        if len(images) == 1:
            path = path_below(images[0], reader.image_root)
            if path is None:
                raise ValueError(
                    f"{source.path}: record {index} has no path of an image below {reader.image_root}, by which its target"
                    f" could be found in {source.targets}. Records that hold their images hold their targets, too."
                )
            yield path


def _record_reader(
    source: Source,
    columns: Columns,
    image_processor: HydraImageProcessor,
    video_processor: HydraVideoProcessor | None,
) -> RecordReader:
    prompts = () if TASKS[source.task].paint is None else PROMPTS[source.task]
    if source.prompts is not None:
        prompts = read_prompts(source.prompts)
    latents = None if source.latents is None else StoredLatents(source, image_processor)
    return RecordReader(
        columns, _image_root(source), image_processor, latents, prompts=prompts, condition_image_size=source.condition_image_size,
        targets=None if source.targets is None else Path(source.targets).expanduser(), video_processor=video_processor,
    )  # fmt: skip


def fits(source: Source, columns: Columns) -> bool:
    """Whether the records of a source can be samples of its task."""
    return TASKS[source.task].fits(columns)


def needs(source: Source) -> str:
    """What a record of the source's task may hold."""
    task = TASKS[source.task]
    if task.links_source:
        return "source images, instructions and edited images, or conversations,"
    if task.splits_turns:
        return "conversations"
    return f"{'clips' if task.num_videos else 'images'}, captions or conversations"


def _counts_in_block(sources: tuple[Source, ...]) -> list[int]:
    """How many of 1024 numbers each source gets, by the largest remainder."""
    total = sum(source.weight for source in sources)
    shares = [BLOCK * source.weight / total for source in sources]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for index in by_remainder[: BLOCK - sum(counts)]:
        counts[index] += 1
    for source, count in zip(sources, counts):
        if not count:
            raise ValueError(f"{source.path}: weight={source.weight} of {total} in all is less than one in {BLOCK}.")
    return counts


@lru_cache(maxsize=16)
def _places_in_block(seed: int, block: int, counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """For each of 1024 numbers, its source and which of the source's own numbers it is."""
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    random.Random(key_of(seed, "block", block)).shuffle(sources)
    following = [block * count for count in counts]
    places = []
    for source in sources:
        places.append((source, following[source]))
        following[source] += 1
    return places


def _columns_of(source: Source, table: Table | Stream) -> Columns:
    """The columns of some records. Raises ValueError if there are none."""
    records = list(islice(table.some_records(NUM_PROBES), NUM_PROBES))
    if not records and isinstance(table, Stream):
        raise ValueError(f"{source.path} has no records.")
    return find_columns({name for record in records for name in record}, table.class_names)


def _image_root(source: Source) -> Path:
    if source.image_root is not None:
        return Path(source.image_root).expanduser()
    if source.path.startswith(HUB):
        return Path()
    first = Path(find_files(source.path)[0])
    return first if first.is_dir() else first.parent
