import json
import os
import shutil

import pytest

from hydra_hf.data.fingerprint import difference, fingerprint
from hydra_hf.data.sources import parse_source


pytestmark = pytest.mark.usefixtures("cache")


def describe(*sources: str) -> list[dict]:
    """As a record of a run has it."""
    return json.loads(json.dumps([fingerprint(parse_source(source)) for source in sources]))


@pytest.fixture
def shards(files) -> str:
    for number in range(3):
        files.captioned_tar(range(3 * number, 3 * number + 3), f"{number}.tar")
    return f"generate={files.folder}/*.tar"


def test_the_same_data_elsewhere_and_later_are_the_same(files, shards):
    before = describe(shards)
    assert before[0]["num_records"] == 9
    assert difference(before, describe(shards)) == ""
    shutil.copytree(files.folder, files.folder / "copy", copy_function=shutil.copy)
    os.utime(files.folder / "copy" / "0.tar", (1, 1))
    assert difference(before, describe(f"generate={files.folder}/copy/*.tar")) == ""


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda files: (files.folder / "1.tar").unlink(), "lacks the file 1.tar"),
        (lambda files: files.captioned_tar([1], "3.tar"), "has another file, 3.tar"),
        (lambda files: files.captioned_tar([8, 4, 5], "1.tar"), "1.tar has other contents"),
    ],
)
def test_a_changed_list_of_files_is_named(files, shards, change, message):
    before = describe(shards)
    change(files)
    assert (
        difference(before, describe(shards))
        == f"{shards.split(',')[0]}{': ' if 'contents' in message else ' '}{message}"
    )


def test_changed_settings_are_named(shards):
    before = describe(shards)
    assert difference(before, describe(f"{shards},weight=2")).endswith("has weight=2.0 instead of 1.0")
    assert difference(before, describe(f"{shards},split=train[:5]")).endswith(
        "has split='train[:5]' instead of 'train'"
    )
    assert difference(before, describe(shards, shards)) == "2 sources instead of 1"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_a_changed_file_of_any_kind_is_named(files, kind):
    def write(text: str) -> str:
        if kind == "jsonl":
            return str(files.jsonl([{"image": "1.png", "caption": text}]))
        if kind == "parquet":
            return str(files.parquet([1], caption=[text]))
        folder = files.folder / "pictures"
        shutil.rmtree(folder, ignore_errors=True)
        files.folder_of([1])
        (folder / f"{text[2:]}.png").write_bytes(files.png(1))
        return str(folder)

    before = describe(f"generate={write('a cat')}")
    assert difference(before, describe(f"generate={write('a cat')}")) == ""
    assert "has other contents" in difference(before, describe(f"generate={write('a dog')}"))


def test_a_stream_of_the_hub_has_a_fingerprint(files):
    files.parquet([1])
    source = f"generate=hub:{files.folder},streaming=true"
    assert difference(describe(source), describe(source)) == ""
