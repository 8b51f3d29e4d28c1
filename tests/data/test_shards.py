import io
import json
import logging
import os
import tarfile
from collections import Counter

import pytest

from hydra_hf.data import shards
from hydra_hf.data.rows import JsonRows, ParquetRows, RowGroups, TarRows
from hydra_hf.data.shards import find_shard, group_members, open_shards, split_name
from hydra_hf.data.tasks import UnreadableRecordError


pytestmark = pytest.mark.usefixtures("cache")


def rows_of(kind: type, *paths):
    return kind(open_shards(list(map(str, paths)), kind.kind))


def read(rows) -> list:
    """Every record, or the reason why it cannot be read."""
    records = []
    for index in range(len(rows)):
        try:
            records.append(rows[index])
        except UnreadableRecordError as error:
            records.append(str(error))
    return records


def reasons(rows) -> dict[str, int]:
    """What is lost, by reason, without the paths."""
    return {reason.partition(": ")[2]: number for reason, number in rows.lost.items()}


# Tars


def named_tar(files, *names: str):
    """A tar with a member of each name, whose content is its name."""
    path = files.folder / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


def grouped(*names: str) -> tuple[list[list[str]], Counter]:
    """The samples of members of these names, as lists of extensions, and what is lost."""
    lost = Counter()
    samples = group_members(((name, 0, 1) for name in names), lost)
    return [[extension for extension, _, _ in sample] for sample in samples], lost


def test_a_tar_is_read_where_it_lies(files, cache):
    picture = files.png(1)
    path = files.tar([{"png": picture, "txt": b"one", "json": json.dumps({"width": 16}).encode()}, {"txt": b"two"}])
    assert read(rows_of(TarRows, path)) == [{"png": picture, "txt": "one", "json": {"width": 16}}, {"txt": "two"}]
    assert sum(file.stat().st_size for file in cache.rglob("*.arrow")) < path.stat().st_size


def test_neighbours_with_one_name_up_to_the_first_dot_are_a_sample():
    assert grouped("a/0.png", "a/0.txt", "a/1.png", "b/1.png") == ([["png", "txt"], ["png"], ["png"]], {})
    assert grouped("0.jpg", "0.seg.png", "0.cls") == ([["jpg", "seg.png", "cls"]], {})
    assert grouped("A.PNG", "a.txt") == ([["png", "txt"]], {})


@pytest.mark.parametrize(
    "name, expected",
    [
        ("22.05.png", ("22.05", "png")),
        ("v1.0.seg.png", ("v1.0", "seg.png")),
        ("img.2024-01-02.jpg", ("img.2024-01-02", "jpg")),
        ("0.seg.png", ("0", "seg.png")),
        ("0.png", ("0", "png")),
        ("README", ("README", "")),
        ("1.0", ("1", "0")),
    ],
)
def test_a_number_behind_a_dot_belongs_to_the_name(name, expected):
    assert split_name(name) == expected


def test_versions_and_unknown_endings_are_not_merged_into_one_sample():
    versions = [f"v1.{number}.{ending}" for number in range(5) for ending in ("png", "txt")]
    assert grouped(*versions) == ([["png", "txt"]] * 5, {})
    assert grouped("a.x.png", "a.x.txt", "a.y.png", "a.y.txt") == ([["png", "txt"]] * 2, {})
    assert grouped("a.png", "a.txt", "a.1.png", "a.1.txt") == ([["png", "txt"]] * 2, {})


def test_members_of_one_name_in_turns_are_samples_and_in_no_order_are_lost_and_counted():
    assert grouped(*["a.png", "a.txt"] * 20) == ([["png", "txt"]] * 20, {})
    assert grouped(*["a.png"] * 3) == ([["png"]] * 3, {})
    assert grouped(*["a.png"] * 3, *["a.txt"] * 3, "b.txt") == (
        [["txt"]],
        {"members of one name, in no clear order": 6},
    )
    assert grouped("a.png", "a.txt", "a.txt")[1] == {"members of one name, in no clear order": 3}


def test_hidden_members_and_those_without_an_extension_are_counted(files):
    path = named_tar(files, "._a.png", "a.png", "README")
    rows = rows_of(TarRows, path)
    assert read(rows) == [{"png": b"a.png"}]
    assert rows.lost == {f"{path}: members whose name is hidden or has no extension": 2}


def long_tar(files, number: int = 40):
    """Samples of a text each, 1024 bytes in the tar."""
    return files.tar([{"txt": f"number {n} {'x' * 90}".encode()} for n in range(number)])


def numbers(rows) -> list[int]:
    return [int(record["txt"].split()[1]) for record in read(rows)]


@pytest.mark.parametrize("junk", [b"\0", b"\xa5"], ids=["zeros", "noise"])
def test_a_hole_in_a_tar_costs_what_is_in_it_and_is_named(files, junk):
    path = long_tar(files)
    content = bytearray(path.read_bytes())
    content[10 * 1024 : 13 * 1024] = junk * 3 * 1024
    path.write_bytes(content)
    rows = rows_of(TarRows, path)
    assert numbers(rows) == [*range(10), *range(13, 40)]
    assert rows.lost == {f"{path}: 3072 damaged bytes from byte 10240": 1}


def test_a_damaged_header_costs_one_member(files):
    path = long_tar(files)
    content = bytearray(path.read_bytes())
    content[20 * 1024 + 100] ^= 0xFF
    path.write_bytes(content)
    rows = rows_of(TarRows, path)
    assert numbers(rows) == [*range(20), *range(21, 40)]
    assert reasons(rows) == {"1024 damaged bytes from byte 20480": 1}


def test_a_damaged_first_header_costs_one_member(files):
    path = long_tar(files, 5)
    content = bytearray(path.read_bytes())
    content[0:600] = b"\xa5" * 600
    path.write_bytes(content)
    rows = rows_of(TarRows, path)
    assert numbers(rows) == [1, 2, 3, 4]
    assert reasons(rows) == {"1024 damaged bytes from byte 0": 1}


def test_a_hole_that_begins_inside_a_member_costs_that_too(files):
    path = long_tar(files)
    content = bytearray(path.read_bytes())
    content[10 * 1024 + 512 + 50 : 12 * 1024] = bytes(2 * 1024 - 512 - 50)
    path.write_bytes(content)
    rows = rows_of(TarRows, path)
    assert numbers(rows) == [*range(10), *range(12, 40)]
    assert reasons(rows) == {"1024 damaged bytes from byte 11264": 1, "members that end in a hole": 1}


def test_a_hole_at_the_end_is_told_from_the_end_of_a_tar(files):
    path = long_tar(files)
    assert not rows_of(TarRows, path).lost
    content = path.read_bytes()
    path.write_bytes(content[: 20 * 1024] + bytes(20 * 1024))
    rows = rows_of(TarRows, path)
    assert numbers(rows) == list(range(20))
    assert reasons(rows) == {"20480 damaged bytes from byte 20480": 1}


def test_a_cut_shard_is_named_whichever_it_is(files):
    paths = [files.captioned_tar(range(3), f"{n}.tar") for n in range(3)]
    paths[1].write_bytes(paths[1].read_bytes()[: 11 * 512 + 4])  # inside the last text
    rows = rows_of(TarRows, *paths)
    assert len(rows) == 9
    assert rows.lost == {f"{paths[1]}: members that are cut off at the end of a tar": 1}
    assert list(read(rows)[5]) == ["png"]


@pytest.mark.parametrize(
    "size, reason",
    [(8 * 512, "the end of a tar, after byte 4096"), (8 * 512 + 100, "100 damaged bytes from byte 4096")],
)
def test_a_shard_that_is_cut_between_members_is_named(files, size, reason):
    path = files.captioned_tar(range(3))
    path.write_bytes(path.read_bytes()[:size])
    rows = rows_of(TarRows, path)
    assert len(rows) == 2
    assert reasons(rows) == {reason: 1}


def test_an_archive_behind_an_archive_is_read_too(files):
    first, second = long_tar(files, 3).read_bytes(), files.tar([{"txt": b"number 9"}]).read_bytes()
    path = files.folder / "000.tar"
    path.write_bytes(first + second)
    assert numbers(rows_of(TarRows, path)) == [0, 1, 2, 9]


def test_long_names_and_links_do_not_disturb(files):
    path = files.folder / "a.tar"
    name = "x" * 180
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for ending in ("txt", "json"):
            member = tarfile.TarInfo(f"{name}.{ending}")
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.LNKTYPE, f"{name}.txt"
        tar.addfile(link)
    rows = rows_of(TarRows, path)
    assert read(rows) == [{"txt": "{}", "json": {}}]
    assert reasons(rows) == {"links and other members without data": 1}


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", os.urandom(5000)], ids=["empty", "html", "noise"])
def test_what_is_no_tar_is_named_and_the_others_are_read(files, content):
    (files.folder / "1.tar").write_bytes(content)
    rows = rows_of(TarRows, files.captioned_tar([1], "0.tar"), files.folder / "1.tar")
    assert len(rows) == 1
    assert list(rows.lost) == ([f"{files.folder}/1.tar: not a tar file"] if content else [])


@pytest.mark.parametrize("member", [{"txt": b"\xff"}, {"json": b"{broken"}, {"json": b"[" * 100_000}])
def test_a_damaged_member_is_one_unreadable_record(files, member):
    assert read(rows_of(TarRows, files.tar([member, {"txt": b"two"}]))) == [
        f"a damaged .{next(iter(member))}", {"txt": "two"},
    ]  # fmt: skip


def test_text_of_windows_is_text(files):
    contents = ["\ufeffa cat\r\n".encode(), "a cat\r\n".encode("utf-16"), b"a\r\ncat"]
    rows = rows_of(TarRows, files.tar([{"txt": content} for content in contents]))
    assert [record["txt"] for record in read(rows)] == ["a cat\n", "a cat\n", "a\ncat"]


# JSON


def write(files, content: str | bytes, name: str = "a.jsonl"):
    path = files.folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_of_any_types_are_records_and_blank_ones_are_none(files):
    path = write(files, '\ufeff{"id": 1}\r\n\r\n{"id": "x", "image": ["a"]}\n \n{"id": null, "image": "é"}')
    assert read(rows_of(JsonRows, path)) == [{"id": 1}, {"id": "x", "image": ["a"]}, {"id": None, "image": "é"}]


def test_a_malformed_line_is_one_unreadable_record(files):
    path = write(files, b'{"id": 1}\n{broken\n\xff\xfe\n5\n[{"id": 2}]\nnull\n{"id": 3}\n' + b"[" * 100_000)
    malformed, no_dict = "a record that is not JSON", "a record that is not a dict of columns"
    assert read(rows_of(JsonRows, path)) == [
        {"id": 1}, malformed, malformed, no_dict, no_dict, no_dict, {"id": 3}, malformed,
    ]  # fmt: skip


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_records_is_read_by_number(files, indent):
    records = [{"id": number, "text": "é]},{[" * number, "turns": [{"a": 1}, {"b": 2}]} for number in range(5)]
    path = write(files, json.dumps(records, indent=indent, ensure_ascii=False), "a.json")
    rows = rows_of(JsonRows, path)
    assert read(rows) == records
    assert not rows.lost


def test_a_malformed_element_of_a_list_costs_one_record(files):
    records = [json.dumps({"id": number}) for number in range(5)]
    records[2] = '{"id": x}'
    rows = rows_of(JsonRows, write(files, f"[{', '.join(records)}]", "a.json"))
    assert read(rows) == [{"id": 0}, {"id": 1}, {"id": 3}, {"id": 4}]
    assert reasons(rows) == {"malformed places in a JSON list": 1}


def test_a_list_that_is_cut_off_gives_what_is_whole(files):
    rows = rows_of(JsonRows, write(files, '[{"id": 0}, {"id": 1}, {"id', "a.json"))
    assert read(rows) == [{"id": 0}, {"id": 1}]
    assert reasons(rows) == {"a JSON list that is cut off": 1}


def test_json_in_utf_16_is_named(files):
    rows = rows_of(JsonRows, write(files, '{"id": 1}'.encode("utf-16")))
    assert reasons(rows) == {"text in UTF-16, expected UTF-8": 1}


# Parquet


def damage_row_group(path, group: int) -> None:
    import pyarrow.parquet

    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xa5" * column.total_compressed_size
    path.write_bytes(content)


@pytest.mark.parametrize("kind", [ParquetRows, RowGroups])
def test_a_damaged_row_group_costs_its_rows(files, kind):
    path = files.parquet(range(12))
    damage_row_group(path, 1)
    rows = rows_of(kind, path, files.parquet([20], "b.parquet"))
    captions = [record["caption"] if isinstance(record, dict) else record for record in read(rows)]
    readable = [f"number {n}" for n in (*range(4), *range(8, 12), 20)]
    if kind is RowGroups:  # whose rows are not looked at beforehand
        assert captions == [*readable[:4], *["a damaged row group"] * 4, *readable[4:]]
    else:
        assert captions == readable
        ((reason, number),) = rows.lost.items()
        assert (reason.partition(" (")[0], number) == (f"{path}: rows of damaged row groups", 4)


@pytest.mark.parametrize("kind", [ParquetRows, RowGroups])
def test_parquet_files_of_different_columns_and_of_categories_are_read(files, kind):
    import pyarrow
    import pyarrow.parquet

    paths = []
    for number, column in enumerate((pyarrow.array([1, 2]), pyarrow.array(["x", "y"]).dictionary_encode())):
        paths.append(files.folder / f"{number}.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"id": column}), paths[-1], row_group_size=1)
    assert read(rows_of(kind, *paths)) == [{"id": 1}, {"id": 2}, {"id": "x"}, {"id": "y"}]


def test_a_file_that_is_no_parquet_is_named(files):
    rows = rows_of(ParquetRows, write(files, "junk", "a.parquet"), files.parquet([1]))
    assert len(rows) == 1
    assert next(iter(rows.lost)).startswith(f"{files.folder}/a.parquet: not a Parquet file")


# The cache


def test_a_changed_file_is_indexed_again_and_the_same_one_is_not(files, monkeypatch):
    path = files.captioned_tar([1, 2])
    (first,) = open_shards([str(path)], "tar")
    monkeypatch.setattr(shards, "create_shard", lambda *_: pytest.fail("indexed twice"))
    assert open_shards([str(path)], "tar") == [first]
    monkeypatch.undo()


def test_a_digest_belongs_to_the_contents(files):
    def digest(path, kind: str) -> str:
        return open_shards([str(path)], kind)[0].contents.digest

    path = files.tar([{"txt": b"a cat"}])
    before = digest(path, "tar")
    os.utime(path, (1, 1))
    assert digest(path, "tar") == before
    files.tar([{"txt": b"a dog"}])
    assert digest(path, "tar") != before
    lines = [digest(write(files, text, name), "json") for text, name in (("{}", "a.jsonl"), ("[]", "b.jsonl"))]
    assert len({*lines, before}) == 3


def test_a_killed_index_is_made_again(files, monkeypatch):
    path = str(files.captioned_tar(range(3)))
    monkeypatch.setattr(shards, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_shards([path], "tar")
    monkeypatch.undo()
    assert find_shard(path, "tar") is None
    assert open_shards([path], "tar")[0].contents.num_records == 3


def test_processes_divide_the_files_and_wait_for_each_other(files, monkeypatch, caplog):
    """One process holds the lock of a file; the other one indexes the rest, says that it waits, and finds the file done."""
    from filelock import FileLock

    paths = [str(files.captioned_tar([n], f"{n}.tar")) for n in range(3)]
    shards.cache_folder().mkdir(parents=True)
    lock = FileLock(f"{shards._name_of(paths[1], 'tar')}.lock", is_singleton=False)
    lock.acquire()
    index = shards._index

    def release_at_last(file: str, kind: str, timeout: float) -> bool:
        if timeout and file == paths[1] and lock.is_locked:
            assert [find_shard(path, "tar") is not None for path in paths] == [True, False, True]
            assert not index(file, kind, 0.05)
            lock.release()
            return False
        return index(file, kind, timeout)

    monkeypatch.setattr(shards, "_index", release_at_last)
    monkeypatch.setattr(shards.Progress, "seconds", 0)
    with caplog.at_level(logging.WARNING):
        assert [shard.contents.num_records for shard in open_shards(paths, "tar")] == [1, 1, 1]
    assert "2 of 3 files are indexed" in caplog.text


def test_a_missing_file_is_named(files):
    with pytest.raises(ValueError, match="no.tar cannot be read: No such file"):
        open_shards([f"{files.folder}/no.tar"], "tar")
