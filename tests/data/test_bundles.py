import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from hydra_hf.data.bundles import Bundles
from hydra_hf.data.collate import collate
from hydra_hf.data.images import ImageBatches
from hydra_hf.data.readers import create_readers
from hydra_hf.data.sources import Source


pytestmark = pytest.mark.usefixtures("cache")

TASKS = {"text": 2, "understand": 3, "generate": 5}


@pytest.fixture
def make_bundles(files, tiny_processor):
    """A function that makes bundles of the three tasks; `streaming` is as from the Hub."""
    for name in ("chats", "pictures"):
        (files.folder / name).mkdir()
    chats = str(files.jsonl(files.chats(range(20)), "chats/rows.jsonl"))
    pictures = str(files.parquet(range(20), "pictures/rows.parquet"))

    def make_bundles(tasks=TASKS, num_steps=4, streaming=False, chats=chats, **place) -> Bundles:
        sources = (
            source("text", chats, streaming),
            source("understand", pictures, False),
            source("generate", pictures, streaming),
        )
        shares = {name: place[name] for name in ("process_index", "num_processes") if name in place}
        readers = create_readers(sources, tasks, tiny_processor, 0, max_length=128, **shares)
        return Bundles(readers, tasks, tiny_processor, num_steps=num_steps, **place)

    return make_bundles


def source(task: str, path: str, streaming: bool) -> Source:
    """The file, or what `datasets` streams of its folder, as it does of the Hub."""
    return Source(task=task, path=f"hub:{Path(path).parent}" if streaming else path, streaming=streaming)


def decoded(bundles: Bundles, bundle: dict, task: str) -> list[str]:
    """The texts of a task's samples, none for a blank one."""
    batch = bundle[task]
    rows = bundles.processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    return rows[: batch["num_samples"]]


def step_of(all_bundles: list[Bundles], step: int) -> dict[str, dict[int, str]]:
    """Task -> row -> text of a step, of all processes and micro steps."""
    texts = {task: {} for task in all_bundles[0].tasks}
    for bundles in all_bundles:
        for micro_step in range(bundles.accumulation):
            bundle = bundles[step * bundles.accumulation + micro_step]
            for task in texts:
                rows = bundle["rows"][task][: bundle[task]["num_samples"]]
                assert not texts[task].keys() & set(rows)
                texts[task] |= dict(zip(rows, decoded(bundles, bundle, task)))
    return texts


def equal(first: dict, second: dict) -> bool:
    """Whether two bundles are the same."""
    flat, other = flattened(first), flattened(second)
    return flat.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in flat.items())


def flattened(bundle: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    flat = {}
    for name, value in bundle.items():
        flat |= (
            flattened(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: torch.as_tensor(value)}
        )
    return flat


def test_a_bundle_has_a_batch_of_every_task(make_bundles):
    bundles = make_bundles()
    bundle = bundles[2]
    assert len(bundles) == 4
    assert set(bundle) == {"text", "understand", "generate", "step", "micro_step", "rows", "skipped"}
    assert (bundle["step"], bundle["micro_step"]) == (2, 0)
    assert bundle["rows"] == {task: list(range(count)) for task, count in TASKS.items()}
    assert {task: bundle[task]["num_samples"] for task in TASKS} == TASKS
    assert {task: len(bundle[task]["input_ids"]) for task in TASKS} == TASKS
    assert bundle["generate"]["is_generated"].all()
    assert not bundle["understand"]["is_generated"].any()
    assert "pixel_values" not in bundle["text"]


def test_a_task_without_samples_is_no_part_of_a_bundle(make_bundles):
    assert "text" not in make_bundles({"text": 0, "generate": 1})[0]


@pytest.mark.parametrize("num_processes, accumulation", [(1, 2), (2, 1), (3, 1), (2, 3), (1, 7), (8, 1)])
def test_a_step_has_the_same_samples_in_any_number_of_processes_and_micro_steps(
    make_bundles, num_processes, accumulation
):
    shares = [
        make_bundles(process_index=index, num_processes=num_processes, accumulation=accumulation)
        for index in range(num_processes)
    ]
    whole = make_bundles()
    for step in (0, 3):
        assert step_of(shares, step) == step_of([whole], step)
        assert {task: len(rows) for task, rows in step_of([whole], step).items()} == TASKS


def test_steps_go_through_the_data_without_repeating(make_bundles):
    bundles = make_bundles({"understand": 5})
    texts = [text for step in range(4) for text in step_of([bundles], step)["understand"].values()]
    assert len(set(texts)) == 20


def test_a_process_without_a_sample_gets_a_blank_one(make_bundles):
    second = make_bundles({"understand": 1, "generate": 1, "text": 1}, process_index=1, num_processes=2)[0]
    first = make_bundles({"understand": 1, "generate": 1, "text": 1}, process_index=0, num_processes=2)[0]
    for task in ("understand", "generate", "text"):
        assert [first[task]["num_samples"], second[task]["num_samples"]] == [1, 0]
        assert second["rows"][task] == [1]
        assert first[task].keys() == second[task].keys()
        assert (second[task]["labels"] != -100).any()
    assert second["generate"]["image_grid_thw"].tolist() == [[1, 1, 1]]  # the smallest picture there is
    assert second["generate"]["is_generated"].tolist() == [True]
    assert second["understand"]["is_generated"].tolist() == [False]


def test_an_item_is_a_function_of_its_number(make_bundles):
    first, second = make_bundles(accumulation=2), make_bundles(accumulation=2)
    for index in (5, 0, 7):
        assert equal(first[index], second[index])
    assert not equal(first[0], first[2])


def test_a_loader_with_workers_gives_the_same_bundles(make_bundles):
    bundles = make_bundles({"understand": 2}, num_steps=3)
    loader = DataLoader(bundles, batch_size=1, collate_fn=lambda items: items[0], num_workers=1)
    loaded = list(loader)
    assert len(loaded) == 3
    assert all(equal(item, bundles[index]) for index, item in enumerate(loaded))


def test_skipped_records_are_told_with_the_bundle_they_were_missed_in(files, make_bundles):
    chats = files.chats(range(10))
    chats[4] = {"conversations": []}
    bundles = make_bundles({"text": 5, "generate": 1}, chats=str(files.jsonl(chats, "chats.jsonl")))
    skipped = [bundles[step]["skipped"] for step in range(2)]  # one epoch
    assert sum(counts["text"] for counts in skipped) >= 1
    assert sum(counts["text"] for counts in skipped) == sum(bundles.readers["text"].num_skipped.values())
    assert all(counts["generate"] == 0 for counts in skipped)


# Streams


@pytest.mark.parametrize("accumulation", [1, 2])
def test_streams_go_on_where_a_step_began(make_bundles, accumulation):
    place = {"streaming": True, "accumulation": accumulation, "process_index": 1, "num_processes": 2, "num_steps": 9}
    unbroken = [make_bundles(**place)]
    unbroken = [unbroken[0][index] for index in range(9 * accumulation)]
    bundles = make_bundles(**place)
    for index in range(5 * accumulation + 1):  # one more than trained: a loader fetches ahead
        assert equal(bundles[index], unbroken[index])
    state = json.loads(json.dumps(bundles.state_dict(5)))
    again = make_bundles(**place)
    again.load_state_dict(state)
    for index in range(5 * accumulation, 9 * accumulation):
        assert equal(again[index], unbroken[index])


def test_the_position_after_the_last_bundle_is_known(make_bundles):
    bundles = make_bundles(streaming=True)
    bundles[0]
    assert bundles.state_dict(1)["step"] == 1
    with pytest.raises(ValueError, match=r"position at step=3 is not known, expected one of \[0\]"):
        bundles.state_dict(3)


def test_a_table_has_no_position(make_bundles):
    bundles = make_bundles()
    assert bundles.state_dict(3) == {}
    bundles.load_state_dict({})


def test_processes_share_the_streams_out(make_bundles):
    shares = [make_bundles(streaming=True, process_index=index, num_processes=2) for index in range(2)]
    texts = [
        text for step in range(4) for text in step_of(shares, step)["generate"].values()
    ]  # 20 samples of 20 records; one process takes 3 a step, the other 2
    assert len(set(texts)) == 18


def test_a_stream_with_too_few_records_for_a_process_gives_blank_samples(files, make_bundles):
    (files.folder / "one").mkdir()
    chats = str(files.jsonl(files.chats([1]), "one/rows.jsonl"))
    bundles = make_bundles({"text": 4}, chats=chats, streaming=True, process_index=1, num_processes=2)
    assert [bundles[0]["text"]["num_samples"], bundles[0 + 1]["rows"]["text"]] == [0, [4]]


def test_streams_are_read_in_order(make_bundles):
    bundles = make_bundles(streaming=True)
    with pytest.raises(ValueError, match="give bundle 0 next and cannot give 2"):
        bundles[2]


def test_streams_are_not_read_by_workers(make_bundles):
    loader = DataLoader(make_bundles(streaming=True), batch_size=1, collate_fn=lambda items: items[0], num_workers=1)
    with pytest.raises(ValueError, match="expected a loader without workers"):
        next(iter(loader))


# Wrong arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tasks": {"text": 1}, "num_steps": 0}, "num_steps=0"),
        ({"tasks": {"text": 1}, "accumulation": 0}, "accumulation=0"),
        ({"tasks": {"text": -1}}, "must be positive"),
        ({"tasks": {}}, "must be positive"),
        ({"tasks": {"text": 1}, "process_index": 2, "num_processes": 2}, "process_index=2 must be one of"),
    ],
)
def test_wrong_sizes_are_refused(make_bundles, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_bundles(**arguments)


def test_readers_have_to_fit_the_tasks_and_the_processes(make_bundles, tiny_processor):
    readers = make_bundles({"generate": 1}, streaming=True).readers
    with pytest.raises(ValueError, match=r"none for the tasks \['understand'\]"):
        Bundles(readers, {"understand": 1}, tiny_processor, num_steps=1)
    with pytest.raises(ValueError, match="divided among another number"):
        Bundles(readers, {"generate": 1}, tiny_processor, num_steps=1, num_processes=2)
    with pytest.raises(ValueError, match="Got positions of"):
        make_bundles(streaming=True).load_state_dict({"step": 1, "streams": {"generate": {}}})


def test_no_bundle_comes_after_the_last(make_bundles):
    assert len(list(make_bundles({"text": 1}, num_steps=3))) == 3


# Images alone


def image_batches(path, batch_size: int = 4, task: str = "generate", **kwargs) -> ImageBatches:
    return ImageBatches((Source(task=task, path=str(path), **kwargs),), (32,), 0, batch_size=batch_size)


def numbers_of(number_in, batches: ImageBatches, steps, rows: range) -> list[int]:
    return [number_in(image) for step in steps for image in batches(step, rows)]


def test_images_need_no_captions(files, number_in):
    batches = image_batches(files.folder_of(range(12)))
    assert batches(0, range(4)).shape == (4, 3, 32, 32)
    assert sorted(numbers_of(number_in, batches, range(3), range(4))) == list(range(12))
    assert batches.num_skipped == {}


def test_rows_of_processes_make_up_the_step(files):
    batches = image_batches(files.parquet(range(12)))
    whole = batches(5, range(4))
    assert torch.equal(torch.cat([batches(5, range(0, 2)), batches(5, range(2, 4))]), whole)
    assert torch.equal(batches(5, range(1, 4, 2)), whole[1::2])


@pytest.mark.parametrize("kind", ["parquet", "streamed parquet", "tar"])
def test_images_read_by_several_threads_are_those_of_one(files, monkeypatch, kind):
    path = files.captioned_tar(range(24)) if kind == "tar" else files.parquet(range(24))
    read = []
    for num_cores in (1, 9):
        monkeypatch.setattr("hydra_hf.data.sources.count_cores", lambda number=num_cores: number)
        batches = image_batches(path, 24, streaming=kind == "streamed parquet")
        read.append(torch.stack([batches(step, range(24)) for step in range(3)]))
        assert batches.threads._max_workers == (8 if num_cores == 9 else 1)
    assert torch.equal(*read)


def test_images_are_whole_or_mirrored(files):
    halves = torch.zeros(16, 16, dtype=torch.uint8)
    halves[:, 8:] = 255
    from PIL import Image

    folder = files.folder_of([])
    Image.fromarray(halves.numpy()).save(folder / "a.png")
    is_mirrored = image_batches(folder)(0, range(200))[:, 0, 0, 0] > 0
    assert 70 < is_mirrored.sum() < 130


def test_images_of_chats_are_taken_too(files, number_in):
    files.folder_of([3])
    rows = [{"image": "pictures/003.png", "conversations": [{"from": "human", "value": "<image>?"}]}]
    assert numbers_of(number_in, image_batches(files.jsonl(rows), task="understand"), [0], range(2)) == [3, 3]


def test_images_that_cannot_be_decoded_are_counted(files):
    folder = files.folder_of(range(4))
    (folder / "001.png").write_bytes(b"junk")
    batches = image_batches(folder)
    assert math.isfinite(batches(0, range(4)).sum())
    assert list(batches.num_skipped) == [f"{folder}: an image that cannot be decoded"]


def test_sources_without_images_are_refused(files):
    path = files.jsonl(files.chats([1]))
    with pytest.raises(ValueError, match="none of a task with images"):
        image_batches(path, task="text")
    with pytest.raises(ValueError, match=r"columns \('conversations',\)"):
        image_batches(path, task="understand")
    with pytest.raises(ValueError, match="expected sources that images can be taken from by number"):
        image_batches("hub:owner/name", streaming=True)


def test_a_bundle_is_what_the_samples_collate_to(make_bundles, tiny_processor):
    bundles = make_bundles({"understand": 3})
    samples = [bundles.readers["understand"][3 + row] for row in range(3)]
    batch = dict(bundles[1]["understand"])
    assert batch.pop("num_samples") == 3
    assert equal(batch, collate(samples, tiny_processor))
