import json

import pytest

from hydra_hf.data.sources import Source
from hydra_hf.data.tables import STREAM_BLOCK, Stream, Table, find_files, open_source, open_table


pytestmark = pytest.mark.usefixtures("cache")


def caption(record: dict) -> str:
    return record.get("caption") or record["txt"]


def captions(table: Table, count: int) -> list[str]:
    """Of the first `count` numbers."""
    return [caption(table.record(next(table.candidates(number)))) for number in range(count)]


def table_of(path, key=(0, 0), **settings) -> Table:
    return open_table(Source(task="generate", path=str(path), **settings), key)


def stream_of(folder, process_index: int = 0, num_processes: int = 1, key=(0, 0)) -> Stream:
    """What `datasets` streams of a folder, as it does of the Hub."""
    source = Source(task="generate", path=f"hub:{folder}", streaming=True)
    return open_table(source, key, process_index, num_processes)


# Files


def test_number_ranges_and_globs_name_files_in_order(tmp_path):
    for name in ("a-008.tar", "a-009.tar", "a-010.tar", "b.tar"):
        (tmp_path / name).write_text("")
    names = [file.rpartition("/")[2] for file in find_files(f"{tmp_path}/a-{{008..010}}.tar")]
    assert names == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert [file.rpartition("/")[2] for file in find_files(f"{tmp_path}/*b.tar")] == ["b.tar"]


def test_every_file_of_a_range_has_to_be_there(tmp_path):
    (tmp_path / "0.tar").write_text("")
    with pytest.raises(ValueError, match=r"no file or folder .*1\.tar"):
        find_files(f"{tmp_path}/{{0..1}}.tar")
    with pytest.raises(ValueError, match="no file or folder"):
        find_files(f"{tmp_path}/*.json")


@pytest.mark.parametrize("pattern", ["set [1]/rows.jsonl", "set [1]/*.jsonl", "set [1]/rows.{0..0}.jsonl"])
def test_brackets_in_the_name_of_a_folder_are_no_pattern(files, pattern):
    (files.folder / "set [1]").mkdir()
    for name in ("rows.jsonl", "rows.0.jsonl"):
        files.jsonl(files.chats([1, 2]), f"set [1]/{name}")
    assert all("set [1]" in file for file in find_files(f"{files.folder}/{pattern}"))
    assert len(open_source(Source(task="text", path=f"{files.folder}/{pattern}"))) in (2, 4)


def test_a_path_in_the_home_folder_is_found(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files.folder))
    path = str(files.jsonl([{}]))
    assert find_files("~/rows.jsonl") == [path]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_on_the_hub_that_cannot_be_reached_is_named(streaming):
    with pytest.raises(ValueError, match="hub:owner/name cannot be read: .*'owner/name'"):
        open_table(Source(task="generate", path="hub:owner/name", streaming=streaming), (0, 0))


@pytest.mark.parametrize("kind", ["parquet", "tar", "jsonl"])
@pytest.mark.parametrize("split, expected", [("train[2:4]", [2, 3]), ("train[75%:]+train[:1]", [9, 10, 11, 0])])
def test_a_slice_of_any_kind_of_source_is_read(files, kind, split, expected):
    rows = open_source(Source(task="generate", path=write_two_shards(files, kind), split=split))
    assert [caption(rows[index]) for index in range(len(rows))] == [f"number {n}" for n in expected]


def test_a_slice_that_is_none_or_empty_is_refused(files):
    path = str(files.parquet([1]))
    with pytest.raises(ValueError, match=r"split='train\[a:b\]' is not a slice"):
        open_source(Source(task="generate", path=path, split="train[a:b]"))
    with pytest.raises(ValueError, match="rows.parquet has no records"):
        open_source(Source(task="generate", path=path, split="train[1:]"))


# Order


def test_every_epoch_is_a_permutation_and_no_two_are_the_same(files):
    table = table_of(files.parquet(range(20)))
    read = captions(table, 60)
    epochs = [read[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(f"number {n}" for n in range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_belongs_to_the_key(files):
    path = files.parquet(range(20))
    assert captions(table_of(path), 40) == captions(table_of(path), 40)
    assert captions(table_of(path, (1, 0)), 20) != captions(table_of(path), 20) != captions(table_of(path, (0, 1)), 20)


@pytest.mark.parametrize("streaming", [False, True])
def test_going_back_gives_the_same_record(files, streaming):
    table = table_of(files.parquet(range(9)), streaming=streaming)
    forwards = captions(table, 25)
    assert [caption(table.record(next(table.candidates(n)))) for n in range(24, -1, -1)] == forwards[::-1]


@pytest.mark.parametrize("kind", ["parquet", "tar", "jsonl"])
def test_local_files_that_are_streamed_are_read_in_epochs_by_shuffled_parts(files, kind):
    table = table_of(write_two_shards(files, kind), streaming=True)
    read = captions(table, 36)
    epochs = [read[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == sorted(f"number {n}" for n in range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_what_takes_a_place_in_streamed_files_is_near_by_and_always_the_same(files):
    table = table_of(files.parquet(range(20)), streaming=True)
    first = [index for index, _ in zip(table.candidates(3), range(50))]
    assert first == [index for index, _ in zip(table.candidates(3), range(50))]
    assert len(set(first)) > 10


def test_streamed_parquet_is_not_copied(files, cache):
    path = files.parquet(range(40))
    captions(table_of(path, streaming=True), 40)
    assert sum(file.stat().st_size for file in cache.rglob("*.arrow")) < path.stat().st_size / 4


# Streams of the Hub


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_a_stream_out_among_them(files, num_processes):
    folder = write_folder(files)
    read = [texts(stream_of(folder, index, num_processes), 12 // num_processes) for index in range(num_processes)]
    assert sorted(sum(read, [])) == sorted(f"number {n}" for n in range(12))


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("block", [5, STREAM_BLOCK])
def test_a_stream_is_shuffled_and_resumes_exactly(files, num_processes, block, monkeypatch):
    monkeypatch.setattr("hydra_hf.data.tables.STREAM_BLOCK", block)
    folder, index = write_folder(files), num_processes - 1
    whole = texts(stream_of(folder, index, num_processes), 30)
    assert whole != sorted(whole, key=lambda text: int(text.split()[1]))
    assert whole[: 12 // num_processes] != whole[12 // num_processes : 24 // num_processes]
    for place in (0, 1, 4, 5, 12, 13):  # ends of shards, blocks and rounds among them
        stream = stream_of(folder, index, num_processes)
        before = texts(stream, place)
        state = json.loads(json.dumps(stream.state_dict()))
        again = stream_of(folder, index, num_processes)
        again.load_state_dict(state)
        assert before + texts(again, 30 - place) == whole


def test_a_process_with_an_empty_share_of_a_stream_gets_nothing(files):
    (files.folder / "one").mkdir()
    files.parquet(range(2), "one/rows.parquet")
    assert [len(texts(stream_of(files.folder / "one", index, 3), 2)) for index in range(3)] == [2, 2, 0]


def write_two_shards(files, kind: str) -> str:
    for shard in range(2):
        numbers = range(6 * shard, 6 * shard + 6)
        if kind == "parquet":
            files.parquet(numbers, f"{shard}.parquet")
        elif kind == "tar":
            files.captioned_tar(numbers, f"{shard}.tar")
        else:
            files.jsonl([{"caption": f"number {n}"} for n in numbers], f"{shard}.jsonl")
    return f"{files.folder}/{{0..1}}.{kind}"


def write_folder(files):
    """A folder of two Parquet files, which `datasets` takes for a data set."""
    write_two_shards(files, "parquet")
    return files.folder


def texts(stream: Stream, count: int) -> list[str]:
    """Captions of the next `count` records; fewer when the stream is empty."""
    places = (next(stream.candidates(0), None) for _ in range(count))
    return [caption(stream.record(place)) for place in places if place is not None]
