"""Latents that are encoded once: a run that reads them is the run that encodes, and never another."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra_run import STAGE, recipe
from PIL import Image
from safetensors.torch import load_file, save_file

from hydra_hf.cli import main
from hydra_hf.data.latents import StaleLatentsError, StoredLatents
from hydra_hf.data.readers import create_readers
from hydra_hf.data.sources import Source, Sources, parse_source
from hydra_hf.data.tasks import UnreadableRecordError
from hydra_hf.modeling import HydraImageProcessor, HydraProcessor, HydraTokModel
from hydra_hf.training import latents as training_latents
from hydra_hf.training.hydra_trainer import create_bundles, train_hydra
from hydra_hf.training.latents import prepare_latents


pytest.importorskip("datasets")
TASKS = {"understand": 3, "generate": 3}
NUM_RECORDS, UNREADABLE = 10, 5
SIZES = [(64, 64), (90, 70), (40, 120), (200, 64)]  # (width, height)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Pictures of several sizes, one of which is broken: with captions, and in conversations about two of them."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for number in range(NUM_RECORDS):
        width, height = SIZES[number % len(SIZES)]
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / f"{UNREADABLE}.png").write_bytes(b"no picture")
    captions = [{"image": f"{n}.png", "caption": f"a cat and {n} dogs"} for n in range(NUM_RECORDS)]
    turns = [{"role": "user", "content": "<image> a cat <image>"}, {"role": "assistant", "content": "a dog"}]
    chats = [{"images": [f"{n}.png", f"{n + 1}.png"], "messages": turns} for n in range(NUM_RECORDS - 1)]
    for name, records in {"captions": captions, "chats": chats}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(training_latents, "SHARD_SIZE", 4)


def sources_of(files: Path, latents: Path | None = None) -> tuple[Source, ...]:
    names = {"understand": "chats", "generate": "captions"}
    return tuple(
        Source(task=task, path=str(files / f"{name}.jsonl"), latents=None if latents is None else str(latents / task))
        for task, name in names.items()
    )


def recipe_of(files: Path, folder: Path, latents: Path | None = None, **changes):
    """Images of any size, up to 64 x 64 pixels."""
    made = recipe(folder, TASKS, num_steps=3, **changes)
    policy = HydraImageProcessor(size={"min_pixels": 32 * 32, "max_pixels": 64 * 64}, patch_size=16)
    processor = HydraProcessor(policy, made.processor.tokenizer, patch_size=16)
    return replace(made, processor=processor).with_overrides(data=Sources(sources_of(files, latents)))


def tower_of(made) -> HydraTokModel:
    return HydraTokModel.from_pretrained(made.tokenizer, dtype=torch.float32).eval()


def prepare(made, tower=None, mixed_precision="no", **options) -> list[str]:
    """Encodes the data of the recipe's stage."""
    sources, tower = list(made.stages[0].data.sources), tower or tower_of(made)
    lines = prepare_latents(sources, made.processor, tower, mixed_precision=mixed_precision, **options)
    return "\n".join(map(str, lines)).splitlines()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "/" in name or name == "skipped"} for row in rows]


def refuse(*_):
    raise AssertionError("the encoder ran")


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_run_on_latents_has_the_losses_of_one_that_encodes_and_does_not_run_the_encoder(
    files, tmp_path, monkeypatch, mixed_precision
):
    encoding = recipe_of(files, tmp_path, mixed_precision=mixed_precision)
    reading = recipe_of(files, tmp_path, tmp_path / "latents", mixed_precision=mixed_precision)
    whole = train_hydra(encoding, tmp_path / "encoding", only="stage1")
    prepare(reading, mixed_precision=mixed_precision)
    monkeypatch.setattr("hydra_hf.modeling.modeling_hydra_tok.GenViT.forward", refuse)
    monkeypatch.setattr("hydra_hf.modeling.bottleneck.Bottleneck.forward", refuse)
    monkeypatch.setattr("hydra_hf.data.records.RecordReader._pixels", refuse)
    other = train_hydra(reading, tmp_path / "reading", only="stage1")
    assert losses_of(whole) == losses_of(other)
    assert any(row.get("skipped") for row in losses_of(whole))
    torch.testing.assert_close(weights_of(other), weights_of(whole), rtol=0, atol=1e-6)


def test_the_refusal_of_the_encoder_is_seen_by_a_run_that_encodes(files, tmp_path, monkeypatch):
    monkeypatch.setattr("hydra_hf.modeling.modeling_hydra_tok.GenViT.forward", refuse)
    with pytest.raises(AssertionError, match="the encoder ran"):
        train_hydra(recipe_of(files, tmp_path), tmp_path / "run", only="stage1")


def test_latents_are_those_of_the_processors_pixels_at_any_size(files, tmp_path):
    made = recipe_of(files, tmp_path, tmp_path / "latents")
    lines = prepare(made, num_workers=0)
    assert [line.removeprefix(f"{files}/") for line in lines if "chats" in line] == [
        *(f"chats.jsonl: {n} of 3 files" for n in (1, 2, 3)),
        f"skipped: {files}/chats.jsonl: an image that cannot be decoded (2)",
        f"chats.jsonl: the latents of 9 records are in {tmp_path}/latents/understand",
    ]
    tower, image_processor = tower_of(made), made.processor.image_processor
    chats, captions = (StoredLatents(source, image_processor) for source in made.stages[0].data.sources)
    grids = set()
    for number in (0, 1, 6, 8):
        images = [Image.open(files / f"{n}.png") for n in (number, number + 1)]
        inputs = [image_processor(image, return_tensors="pt") for image in images]
        inputs.append(image_processor.preprocess_generated(images[0], return_tensors="pt"))
        for (grid, mean), given in zip([*chats[number], *captions[number]], inputs, strict=True):
            assert [list(grid)] == given["image_grid_thw"].tolist()
            expected = tower.encode_means(given["pixel_values"][None], [grid])[0]
            torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
            grids.add(grid)
    assert len(grids) > 3
    for stored, number in ((captions, 5), (chats, 4), (chats, 5)):
        with pytest.raises(UnreadableRecordError, match="an image that cannot be decoded"):
            stored[number]


def killed_while_writing(tensors: dict, path: Path, metadata: dict) -> None:
    """Dies in the middle of the second shard."""
    if "000001" in path.name:
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(tensors, path, metadata)


def test_a_killed_preparation_is_resumed_where_it_was(files, tmp_path, monkeypatch):
    whole, killed = (recipe_of(files, tmp_path, tmp_path / name) for name in ("whole", "killed"))
    prepare(whole)
    if (child := os.fork()) == 0:
        monkeypatch.setattr("safetensors.torch.save_file", killed_while_writing)
        prepare(killed, num_workers=0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    folder = tmp_path / "killed" / "understand"
    written = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")  # what was half written is hidden
    assert written == ["000000.safetensors", "latents.json"]
    with pytest.raises(ValueError, match="lacks 2 files, such as 000001.safetensors: run `hydra prepare latents`"):
        create_bundles(killed, killed.stages[0], seed=0)
    done = (folder / "000000.safetensors").stat().st_mtime_ns
    prepare(killed)
    assert (folder / "000000.safetensors").stat().st_mtime_ns == done
    for path in sorted((tmp_path / "whole").rglob("*.safetensors")):
        again = tmp_path / "killed" / path.relative_to(tmp_path / "whole")
        torch.testing.assert_close(load_file(again), load_file(path), rtol=0, atol=0)


def test_a_second_preparation_encodes_nothing(files, tmp_path, monkeypatch):
    made = recipe_of(files, tmp_path, tmp_path / "latents")
    prepare(made)
    monkeypatch.setattr("hydra_hf.modeling.modeling_hydra_tok.GenViT.forward", refuse)
    assert prepare(made) == [
        f"{files}/chats.jsonl: the latents of 9 records are in {tmp_path}/latents/understand",
        f"{files}/captions.jsonl: the latents of 10 records are in {tmp_path}/latents/generate",
    ]


@pytest.fixture
def prepared(files, tmp_path):
    made = recipe_of(files, tmp_path, tmp_path / "latents")
    prepare(made, num_workers=0)
    return made


def with_policy(made, **size):
    policy = HydraImageProcessor(size=size, patch_size=16)
    return replace(made, processor=HydraProcessor(policy, made.processor.tokenizer, patch_size=16))


def other_weights(made, folder: Path):
    tower = tower_of(made)
    tower.gen_vit.layers[0].mlp.fc1.bias.data += 1e-6
    tower.save_pretrained(folder)
    return replace(made, tokenizer=str(folder))


def other_captions(made, folder: Path):
    sources = [replace(source, path=str(folder / Path(source.path).name)) for source in made.stages[0].data.sources]
    for source, old in zip(sources, made.stages[0].data.sources):
        rows = Path(old.path).read_text().replace("dog", "fox")
        Path(source.path).write_text(rows)
    return made.with_overrides(data=Sources(tuple(sources)))


def test_latents_of_something_else_are_refused_by_the_name_of_the_field(prepared, tmp_path):
    cases = {
        r"image_policy.size=.*'max_pixels': 4096.*has .*'max_pixels': 1024": with_policy(
            prepared, min_pixels=256, max_pixels=1024
        ),
        r"encoder.weights='\w+', but this run has '\w+'": other_weights(prepared, tmp_path / "other"),
        r"encoder.mixed_precision='no', but this run has 'bf16'": prepared.with_overrides(mixed_precision="bf16"),
        r"latents of other data: understand=.*chats.jsonl has other contents": other_captions(prepared, tmp_path),
        r"stage1 trains model.vision_tower.gen_vit.* leave latents=": prepared.with_overrides(
            learning_rates={**STAGE.learning_rates, "model.vision_tower.gen_vit": 1e-5}
        ),
        r"stage1 trains model.vision_tower.bottleneck.down_proj.bias": prepared.with_overrides(
            learning_rates={**STAGE.learning_rates, "model.vision_tower.bottleneck": 1e-5}
        ),
    }
    for number, (message, made) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            train_hydra(made, tmp_path / str(number), only="stage1")
    with pytest.raises(ValueError, match="encoder.weights"):
        prepare(other_weights(prepared, tmp_path / "third"))


@pytest.mark.parametrize("changed", ["3.png", "depth/3.png"])
def test_latents_of_an_image_or_a_target_that_was_made_again_are_refused(files, tmp_path, changed):
    own, folder = tmp_path / "own", tmp_path / "latents"
    shutil.copytree(files, own)
    (own / "depth").mkdir()
    for number in range(NUM_RECORDS):
        size = SIZES[number % len(SIZES)]
        Image.linear_gradient("L").resize(size).save(own / "depth" / f"{number}.png")
    source = Source(task="depth", path=f"{own}/captions.jsonl", targets=f"{own}/depth", latents=str(folder))
    made = recipe_of(own, tmp_path)

    def encode() -> None:
        list(prepare_latents([source], made.processor, tower_of(made), mixed_precision="no", num_workers=0))

    def read() -> None:
        readers = create_readers((source,), {"depth": 1}, made.processor, 0, max_length=128)
        readers["depth"].batch(range(NUM_RECORDS))

    encode()
    for file in (own / "3.png", own / "depth" / "3.png"):
        os.utime(file)  # a copy has another time
    read()
    with Image.open(own / changed) as image:
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(own / changed)
    message = f"{own / changed} has changed since its latents were made: delete {folder}, or .* 000000.safetensors"
    with pytest.raises(StaleLatentsError, match=message):
        read()
    (folder / "000000.safetensors").unlink()
    encode()
    read()


def test_a_stage_that_trains_the_unprojection_for_sem_vit_reads_latents(prepared, tmp_path):
    rates = {**STAGE.learning_rates, "model.vision_tower.bottleneck.semantic_up_proj": 1e-5}
    assert train_hydra(prepared.with_overrides(learning_rates=rates), tmp_path / "run", only="stage1").exists()


def test_missing_latents_are_told_before_the_first_step(files, tmp_path):
    made = recipe_of(files, tmp_path, tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"nowhere/understand has no latents of .*chats.jsonl: run `hydra prepare lat"
    ):
        train_hydra(made, tmp_path / "run", only="stage1")


def test_a_process_without_a_sample_gets_a_blank_one_of_latents(prepared):
    made = prepared.with_overrides(tasks={"understand": 1, "generate": 1})
    stage = made.stages[0]
    bundles = stage.data.bundles(stage, made.processor, 0, max_length=128, process_index=1, num_processes=2)
    batch = bundles[0]["generate"]
    assert batch["num_samples"] == 0
    assert batch["latent_means"].shape == (1, 4)
    assert batch["image_grid_thw"].tolist() == [[1, 1, 1]]


def test_a_vision_tower_is_not_trained_on_latents(prepared):
    with pytest.raises(ValueError, match="a vision tower is trained on pixels"):
        prepared.stages[0].data.images((64,), 2, 0)


def test_what_cannot_be_encoded_or_mixed_is_one_line(files, tmp_path):
    made = recipe_of(files, tmp_path)
    with pytest.raises(ValueError, match="with latents=None, expected a task with images and a folder"):
        prepare(made)
    with pytest.raises(ValueError, match="latents=a are kept by number"):
        parse_source("generate=hub:a/b,streaming=true,latents=a")
    understand, generate = made.stages[0].data.sources
    mixed = Sources((understand, replace(understand, latents=str(tmp_path / "a"), weight=2.0), generate))
    with pytest.raises(ValueError, match="have latents and some do not"):
        create_bundles(made, made.with_overrides(data=mixed).stages[0], seed=0)


def test_the_command_prepares_what_a_run_reads(files, tmp_path, capsys):
    made = recipe_of(files, tmp_path, tmp_path / "latents")
    made.processor.save_pretrained(tmp_path / "init" / "processor")
    source = f"generate={files}/captions.jsonl,latents={tmp_path}/latents/generate"
    options = ["--init", str(tmp_path / "init"), "--tokenizer", made.tokenizer, "--mixed_precision", "no"]
    assert main(["prepare", "latents", "--data", source, "--num_workers", "0", *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"10 records are in {tmp_path}/latents/generate")
    only_generate = made.with_overrides(data=Sources((parse_source(source),)), tasks={"generate": 3})
    train_hydra(only_generate, tmp_path / "run", only="stage1")
    assert main(["prepare", "latents", "--data", source, "--batch_size", "0", *options]) == 2
    assert "batch_size=0 must be at least 1" in capsys.readouterr().err
