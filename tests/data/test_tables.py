import json
import logging

import pytest

from hydra_hf.data.records import UnreadableRecordError
from hydra_hf.data.tables import Stream, Table, find_files, open_dataset, permutation, read_record


pytestmark = pytest.mark.usefixtures("cache")


def captions(table, count: int) -> list[str]:
    """Of the first `count` numbers."""
    return [read_record(next(table.candidates(number))[1])["caption"] for number in range(count)]


def table_of(path, key=(0, 0)) -> Table:
    return Table(open_dataset(str(path), "train", streaming=False), key)


def stream_of(path, process_index: int = 0, num_processes: int = 1) -> Stream:
    return Stream(open_dataset(str(path), "train", streaming=True), process_index, num_processes)


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


def test_brackets_in_the_name_of_a_folder_are_no_pattern(files):
    files.folder_of([1, 2], "set [1]")
    assert len(open_dataset(str(files.folder / "set [1]"), "train", streaming=False)) == 2


def test_files_of_two_kinds_are_refused(files):
    files.parquet([1])
    files.jsonl(files.chats([1]))
    with pytest.raises(ValueError, match=r"ending in \['.jsonl', '.parquet'\]"):
        open_dataset(f"{files.folder}/rows.*", "train", streaming=False)


def test_a_data_set_on_the_hub_that_cannot_be_reached_is_named():
    for streaming in (False, True):
        with pytest.raises(ValueError, match="hub:owner/name cannot be read: .*'owner/name'"):
            open_dataset("hub:owner/name", "train", streaming)


# Tars


def test_a_tar_is_read_where_it_lies(files, cache):
    picture = files.png(1)
    path = files.tar([{"png": picture, "txt": b"one", "json": json.dumps({"width": 16}).encode()}, {"txt": b"two"}])
    table = table_of(path)
    assert [read_record(row) for row in table.first_rows()] == [
        {"png": picture, "txt": "one", "width": 16},
        {"txt": "two"},
    ]
    assert sum(file.stat().st_size for file in cache.rglob("*.arrow")) < path.stat().st_size


def test_a_changed_tar_is_indexed_again(files):
    path = files.captioned_tar([1, 2])
    assert len(table_of(path).rows) == 2
    files.captioned_tar([3, 4, 5])
    assert len(table_of(path).rows) == 3


def test_folders_inside_a_tar_keep_samples_apart(files, tmp_path):
    import tarfile

    (tmp_path / "1.txt").write_text("one")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a/1.txt", "b/1.txt"):
            tar.add(tmp_path / "1.txt", name)
    assert len(table_of(tmp_path / "a.tar").rows) == 2


@pytest.mark.parametrize("member", [{"txt": b"\xff"}, {"json": b"{broken"}])
def test_a_damaged_member_is_one_unreadable_record(files, member):
    table = table_of(files.tar([member, {"txt": b"two"}]))
    damaged, whole = table.first_rows()
    with pytest.raises(UnreadableRecordError, match="a damaged"):
        read_record(damaged)
    assert read_record(whole) == {"txt": "two"}


def test_a_tar_that_is_cut_off_gives_what_is_whole(files, caplog):
    path = files.tar([{"txt": b"one"}, {"txt": b"two" * 1000}])
    content = path.read_bytes()
    path.write_bytes(content[:2000])
    with caplog.at_level(logging.WARNING):
        rows = list(table_of(path).first_rows())
    assert read_record(rows[0]) == {"txt": "one"}
    assert f"{path} is damaged" in caplog.text
    assert len(rows) == 2
    with pytest.raises(UnreadableRecordError, match="cut off"):
        read_record(rows[1])


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
    assert permutation(9, 1, 2).tolist() != permutation(9, 2, 1).tolist()


def test_going_back_gives_the_same_record(files):
    table = table_of(files.parquet(range(5)))
    forwards = captions(table, 25)
    assert [read_record(next(table.candidates(n))[1])["caption"] for n in range(24, -1, -1)] == forwards[::-1]


@pytest.mark.parametrize("kind", ["parquet", "tar", "jsonl"])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_a_stream_out_among_them(files, kind, num_processes):
    path = write_two_shards(files, kind)
    read = [texts(stream_of(path, index, num_processes), 12 // num_processes) for index in range(num_processes)]
    assert sorted(sum(read, [])) == sorted(f"number {n}" for n in range(12))


@pytest.mark.parametrize("kind", ["parquet", "tar", "jsonl"])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_stream_goes_on_where_it_was_saved(files, kind, num_processes):
    path, index = write_two_shards(files, kind), num_processes - 1
    unbroken = texts(stream_of(path, index, num_processes), 30)
    for place in (0, 1, 4, 5, 12, 13):  # ends of shards and rounds among them
        stream = stream_of(path, index, num_processes)
        before = texts(stream, place)
        state = json.loads(json.dumps(stream.state_dict()))
        again = stream_of(path, index, num_processes)
        again.load_state_dict(state)
        assert before + texts(again, 30 - place) == unbroken


def test_a_process_with_an_empty_share_of_a_stream_gets_nothing(files):
    path = files.parquet(range(2))
    assert [len(texts(stream_of(path, index, 3), 2)) for index in range(3)] == [2, 2, 0]


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


def texts(stream: Stream, count: int) -> list[str]:
    """Captions of the next `count` records; fewer when the stream is empty."""
    records = [read_record(row) for _ in range(count) for _, row in [*first_of(stream.candidates(0))]]
    return [record.get("caption") or record["txt"] for record in records]


def first_of(candidates) -> list:
    first = next(candidates, None)
    return [] if first is None else [first]
