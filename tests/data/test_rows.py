import json

import pytest

from hydra_hf.data.rows import FolderRows, SlicedRows, names_a_class, open_rows, unfold_json
from hydra_hf.data.tasks import UnreadableRecordError


pytestmark = pytest.mark.usefixtures("cache")


def read(rows) -> list[dict]:
    return [rows[index] for index in range(len(rows))]


# Folders of images


def test_texts_are_found_whatever_the_case_of_their_names(files):
    folder = files.folder_of([1, 2])
    (folder / "001.png").rename(folder / "A.PNG")
    (folder / "a.TXT").write_bytes("\ufeffa cat\r\n".encode())
    assert read(FolderRows(str(folder))) == [{"image": "002.png", "txt": None}, {"image": "A.PNG", "txt": "a cat\n"}]


def test_a_readme_is_no_caption(files):
    for name in ("cat", "red_fox"):
        files.folder_of([1], f"pets/{name}")
    for text in ("README.txt", "cat/LICENSE.txt"):
        (files.folder / "pets" / text).write_text("where these come from")
    rows = FolderRows(f"{files.folder}/pets")
    assert rows.class_names == ("cat", "red fox")
    assert read(rows) == [{"image": "cat/001.png", "label": 0}, {"image": "red_fox/001.png", "label": 1}]


@pytest.mark.parametrize(
    "name", ["train2017", "val", "Images", "0012", "n01440764", "part-00001", "class_3", "2024-01-02"]
)
def test_a_name_that_says_nothing_of_a_picture_is_no_class(files, name):
    assert not names_a_class(name)
    files.folder_of([1], f"a/{name}")
    files.folder_of([1], "a/cat")
    rows = FolderRows(f"{files.folder}/a")
    assert rows.class_names == ()
    assert name in rows.remark
    assert read(rows)[0].keys() == {"image"}


@pytest.mark.parametrize("name", ["cat", "red_fox", "train station", "7up", "golden-retriever"])
def test_a_name_that_says_something_is_a_class(name):
    assert names_a_class(name)


def test_folders_of_several_depths_are_no_classes(files):
    files.folder_of([1], "a/cat")
    files.folder_of([2], "a/dog/small")
    assert FolderRows(f"{files.folder}/a").class_names == ()


def test_metadata_is_read_line_by_line(files):
    folder = files.folder_of([1, 2, 3])
    lines = [
        {"file_name": "001.png", "text": "one"},
        {"file_name": "002.png", "text": ["two", "2"], "id": 7},
        {"id": "x"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join([*map(json.dumps, lines), "", "{broken"]))
    rows = FolderRows(str(folder))
    assert read(rows) == [
        {"image": "001.png", "text": "one"},
        {"image": "002.png", "text": ["two", "2"], "id": 7},
    ]
    assert {reason.rpartition(": ")[2]: number for reason, number in rows.lost.items()} == {
        "rows without a file_name": 1, "records that are not JSON": 1, "images that it does not name": 1,
    }  # fmt: skip


def test_metadata_in_csv_and_in_folders_below_is_read(files):
    folder = files.folder_of([1], "a/b")
    (folder / "metadata.csv").write_bytes('\ufefffile_name,text\r\n001.png,"a cat, a dog"\r\n'.encode())
    assert read(FolderRows(f"{files.folder}/a")) == [{"image": "b/001.png", "text": "a cat, a dog"}]


def test_hidden_files_and_folders_are_not_images(files):
    folder = files.folder_of([1])
    (folder / "._001.png").write_bytes(b"junk")
    (folder / ".thumbs").mkdir()
    (folder / ".thumbs" / "1.png").write_bytes(b"junk")
    assert read(FolderRows(str(folder))) == [{"image": "001.png"}]


def test_a_folder_without_images_says_what_it_has(files):
    (files.folder / "a").mkdir()
    with pytest.raises(ValueError, match=r"a has no records: expected images \(\.jpg, .*\)\.$"):
        FolderRows(f"{files.folder}/a")
    files.captioned_tar([1], "a/0.tar")
    with pytest.raises(ValueError, match="there are 1 other files, such as 0.tar"):
        FolderRows(f"{files.folder}/a")


def test_a_digest_of_a_folder_belongs_to_what_is_in_it(files):
    folder = files.folder_of([1])
    before = FolderRows(str(folder)).digest
    assert FolderRows(str(folder)).digest == before
    (folder / "001.txt").write_text("a cat")
    assert FolderRows(str(folder)).digest != before


# Others


def test_files_of_two_kinds_are_refused(files):
    paths = [str(files.parquet([1])), str(files.jsonl(files.chats([1])))]
    with pytest.raises(ValueError, match=r"ending in \['.jsonl', '.parquet'\]"):
        open_rows("rows.*", paths, in_place=False)


@pytest.mark.parametrize("in_place", [False, True])
def test_slices_keep_their_records_and_parts(files, in_place):
    paths = [str(files.parquet(range(10), "a.parquet")), str(files.parquet(range(10, 13), "b.parquet"))]
    whole = open_rows("a", paths, in_place)
    assert whole.parts == (
        [range(4), range(4, 8), range(8, 10), range(10, 13)] if in_place else [range(10), range(10, 13)]
    )
    rows = SlicedRows(whole, [range(2, 6), range(9, 12)])
    assert [row["caption"] for row in read(rows)] == [f"number {n}" for n in (2, 3, 4, 5, 9, 10, 11)]
    if in_place:
        assert rows.parts == [range(2), range(2, 4), range(4, 5), range(5, 7)]


def test_row_groups_of_one_size_stay_in_memory_up_to_a_number_of_rows(files, monkeypatch):
    from hydra_hf.data import rows as module

    rows = open_rows("a", [str(files.parquet(range(20)))], in_place=True)
    monkeypatch.setattr(module, "CACHED_ROWS", 8)
    read(rows)
    assert list(rows.tables) == [(0, 3), (0, 4)]


def test_an_open_source_can_be_sent_to_a_worker(files):
    import pickle

    rows = open_rows("a", [str(files.captioned_tar(range(3)))], in_place=False)
    first = rows[0]
    assert pickle.loads(pickle.dumps(rows))[0] == first


def test_the_fields_of_json_are_columns_and_a_member_goes_before_a_field():
    assert unfold_json({"json": {"txt": "a", "width": 1}, "txt": "b"}) == {"txt": "b", "width": 1}
    assert unfold_json({"json": [1]}) == {"json": [1]}


def test_a_text_that_cannot_be_decoded_is_one_record(files):
    folder = files.folder_of([1])
    (folder / "001.txt").write_bytes(b"\xff\xfa")
    with pytest.raises(UnreadableRecordError, match="a damaged .txt"):
        FolderRows(str(folder))[0]
