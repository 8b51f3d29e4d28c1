import os

import pytest

from hydra_hf.files import write_file, write_text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_a_write_that_is_interrupted_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "cat.png"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        write_file(path, write)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("cat.png", "old")]


def test_writing_touches_no_other_file(tmp_path):
    for name in ("cat.tmp.png", "cat.png.tmp"):
        (tmp_path / name).write_text("a user's")
    write_text(tmp_path / "cat.png", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "cat.png": "new", "cat.tmp.png": "a user's", "cat.png.tmp": "a user's"
    }  # fmt: skip


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "index.json"

    def write(temporary):
        write_text(path, "theirs")
        temporary.write_text("ours")

    write_file(path, write)
    assert [found.read_text() for found in tmp_path.iterdir()] == ["ours"]


def test_a_file_has_the_permissions_and_the_long_name_that_any_new_one_has(tmp_path):
    path, other = tmp_path / ("n" * 250 + ".txt"), tmp_path / "other.txt"
    write_text(path, "")
    other.touch()
    assert os.stat(path).st_mode == os.stat(other).st_mode
