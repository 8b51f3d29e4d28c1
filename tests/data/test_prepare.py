import json

import pytest

from hydra_hf.cli import main
from hydra_hf.data import shards
from hydra_hf.data.prepare import index_sources
from hydra_hf.data.sources import parse_source


pytestmark = pytest.mark.usefixtures("cache")


def test_what_is_indexed_beforehand_is_not_indexed_by_a_run(files, capsys, monkeypatch):
    files.captioned_tar(range(3), "0.tar")
    files.captioned_tar(range(3), "1.tar")
    source = f"generate={files.folder}/*.tar"
    assert main(["prepare", "index", "--data", source, "--num_processes", "1"]) == 0
    assert capsys.readouterr().out == f"{files.folder}/*.tar: 6 records\n"
    monkeypatch.setattr(shards, "create_shard", lambda *_: pytest.fail("indexed again"))
    assert main(["prepare", "index", "--data", source, "--num_processes", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"path": f"{files.folder}/*.tar", "num_records": 6, "lost": {}}
    assert captured.err == f"{files.folder}/*.tar: 6 records\n"


def test_what_is_lost_is_said(files):
    path = files.captioned_tar(range(3))
    path.write_bytes(path.read_bytes()[: 8 * 512 + 100])
    (index,) = index_sources([parse_source(f"generate={path}")])
    assert index.lost == {f"{path}: 100 damaged bytes from byte 4096": 1}
    assert str(index).splitlines() == [
        f"{path}: 2 records", f"lost: {path}: 100 damaged bytes from byte 4096 (1)",
    ]  # fmt: skip


@pytest.mark.slow
def test_files_are_indexed_by_several_processes(files, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(shards.cache_folder().parent))
    for number in range(4):
        files.captioned_tar(range(3), f"{number}.tar")
    lines = list(index_sources([parse_source(f"generate={files.folder}/*.tar")], 2))
    assert list(map(str, lines)) == [
        *(f"{files.folder}/*.tar: {n} of 4 files" for n in range(1, 5)),
        f"{files.folder}/*.tar: 12 records",
    ]
    assert all(shards.find_shard(f"{files.folder}/{n}.tar", "tar") for n in range(4))


def test_wrong_arguments_are_one_line(files, capsys):
    assert main(["prepare", "index", "--data", f"generate={files.folder}/no.tar"]) == 2
    assert "There is no file or folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="num_processes=0"):
        list(index_sources([], 0))
