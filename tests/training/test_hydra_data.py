"""The trainer on files: bundles of `data.bundles`, their position in checkpoints, the records they skip."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra_run import EVERYTHING, dialogues, recipe
from PIL import Image
from safetensors.torch import load_file

from hydra_hf.data.sources import Source, Sources
from hydra_hf.training.hydra_trainer import create_bundles, train_hydra


pytest.importorskip("datasets")
TASKS = {"text": 1, "understand": 2, "generate": 2}
NUM_RECORDS = 12
UNREADABLE = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Pictures with captions, one of which is broken, and conversations."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    captions = []
    for number in range(NUM_RECORDS):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        captions.append({"image": f"{number}.png", "caption": f"a cat and {number} dogs"})
    (folder / f"{UNREADABLE}.png").write_bytes(b"no picture")
    turns = [{"role": "user", "content": "what is a cat?"}, {"role": "assistant", "content": "a cat"}]
    for name, records in {"captions": captions, "text": [{"messages": turns}] * 3}.items():
        for path in (folder / f"{name}.jsonl", folder / name / "rows.jsonl"):
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where `datasets` writes."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def recipe_of(files: Path, folder: Path, streaming: bool, num_steps: int = 4):
    paths = {task: "text" if task == "text" else "captions" for task in TASKS}
    sources = [
        Source(task=task, path=f"hub:{files / name}", streaming=True, image_root=str(files))
        if streaming  # what `datasets` streams of a folder, as it does of the Hub
        else Source(task=task, path=str(files / f"{name}.jsonl"))
        for task, name in paths.items()
    ]
    made = recipe(folder, TASKS, num_steps=num_steps, drop_prompt=0.5)
    return replace(made, save_every=2).with_overrides(data=Sources(tuple(sources)))


@pytest.mark.parametrize("streaming", [False, True], ids=["by number", "streaming"])
def test_a_run_on_files_goes_on_exactly_where_it_was(files, tmp_path, streaming):
    made = recipe_of(files, tmp_path, streaming)
    whole = train_hydra(made, tmp_path / "whole", only="stage1")
    parts = tmp_path / "parts" / "stage1"
    parts.mkdir(parents=True)
    (whole.parent / "checkpoint-2").rename(parts / "checkpoint-2")
    assert (parts / "checkpoint-2" / "data-0-of-1.json").exists() == streaming
    again = train_hydra(made, tmp_path / "parts", only="stage1")
    weights = [load_file(path / "model" / "model.safetensors") for path in (whole, again)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_records_that_cannot_be_read_are_counted_in_the_log(files, tmp_path):
    made = recipe_of(files, tmp_path, streaming=False, num_steps=NUM_RECORDS // 2)  # every picture once for each task
    folder = train_hydra(made, tmp_path / "run", only="stage1").parent
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sum(record.get("skipped", 0) for record in records) >= 2
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)


def test_dialogues_with_drawn_images_are_learnt(tmp_path):
    """Text and images of four dialogues: the losses of the same dialogues and the same noise fall."""
    data = dialogues(tmp_path)
    changes = {"num_steps": 60, "learning_rates": dict.fromkeys(EVERYTHING, 1e-3), "ema_decay": 0.0}
    made = recipe(tmp_path, {"interleave": 6}, data=data, held_out=data, num_held_out=12, **changes)
    folder = train_hydra(replace(made, sample_prompts=(), sample_every=20), tmp_path / "run", only="stage1").parent
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name in ("language", "flow"):
        losses = [row[key] for row in rows if (key := f"held_out/interleave/{name}") in row]
        assert len(losses) == 3
        assert losses[-1] < 0.7 * losses[0], (name, losses)


def test_a_stream_of_another_number_of_processes_is_refused(files, tmp_path):
    made = recipe_of(files, tmp_path, streaming=True)
    folder = train_hydra(made, tmp_path / "run", only="stage1").parent
    state = folder / "checkpoint-4" / "data-0-of-1.json"
    state.rename(state.with_name("data-0-of-3.json"))
    (folder / "final").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"\['data-0-of-3.json'\], expected data-0-of-1.json"):
        train_hydra(made, tmp_path / "run", only="stage1")


@pytest.mark.parametrize("num_workers", [None, 1])
def test_workers_that_read_ahead_change_nothing(files, tmp_path, num_workers, monkeypatch):
    monkeypatch.setattr(Sources, "num_workers", 1)
    alone, ahead = recipe_of(files, tmp_path, False, 2), recipe_of(files, tmp_path, False, 2)
    runs = [(replace(alone, num_workers=0), "alone"), (replace(ahead, num_workers=num_workers), "ahead")]
    weights = [
        load_file(train_hydra(made, tmp_path / name, only="stage1") / "model" / "model.safetensors")
        for made, name in runs
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_workers_are_as_many_as_the_cores_leave(files, monkeypatch):
    data = Sources((Source(task="text", path="a.jsonl"),))
    monkeypatch.setattr("hydra_hf.data.sources.count_cores", lambda: 64)
    assert data.num_workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert data.num_workers == 3
    monkeypatch.setattr("hydra_hf.data.sources.count_cores", lambda: 1)
    assert data.num_workers == 0
    assert Sources((Source(task="text", path="hub:a/b", streaming=True),)).num_workers == 0


def test_streams_are_not_read_ahead_by_workers(files, tmp_path):
    made = replace(recipe_of(files, tmp_path, streaming=True), num_workers=2)
    with pytest.raises(ValueError, match="num_workers=2"):
        create_bundles(made, made.stages[0], seed=0)


def test_samples_longer_than_the_recipe_allows_are_not_trained_on(files, tmp_path):
    made = replace(recipe_of(files, tmp_path, streaming=False), max_length=5)
    with pytest.raises(ValueError, match="none of 1000 records can be read; .*more than max_length=5 tokens"):
        create_bundles(made, made.stages[0], seed=0)[0]


def test_the_recipes_sources_are_the_data_of_a_stage_without_its_own(files, tmp_path):
    made = recipe_of(files, tmp_path, streaming=False)
    (stage,) = made.stages
    sources = stage.data.sources
    for data in (sources, Sources(sources)):
        shared = replace(made, stages=(replace(stage, data=None),), data=data)
        assert shared.data_of(shared.stages[0]) == Sources(sources)
        bundles = [create_bundles(recipe, recipe.stages[0], seed=0)[0] for recipe in (made, shared)]
        torch.testing.assert_close(*bundles, rtol=0, atol=0)
    assert replace(made, data=sources[:1]).data_of(stage) == stage.data
