from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vision_tower_run import CONFIG, make_stage

from hydra_hf.data.images import ImageBatches, ReadAhead, check_range
from hydra_hf.data.seeds import hashed_generator
from hydra_hf.data.sources import Source, Sources
from hydra_hf.files import write_video
from hydra_hf.toy.batches import ToyBatches, ToyHeldOut, choose_canvas, toy_images
from hydra_hf.toy.world import CANVASES, ToyWorld
from hydra_hf.training.processes import share_of, split_batch
from hydra_hf.training.randomness import row_generator
from hydra_hf.training.recipe import Recipe, TokenizerLossWeights
from hydra_hf.training.vision_tower_trainer import create_batches


def draw(*numbers: int) -> list[float]:
    return torch.rand(4, generator=row_generator(*numbers)).tolist()


def test_a_row_draws_the_same_whenever_it_is_asked():
    assert draw(1, 2, 3) == draw(1, 2, 3)


@pytest.mark.parametrize("other", [(2, 2), (1, 3), (2, 1), (1 + 2**32, 2)])
def test_another_step_or_seed_gives_another_stream(other):
    streams = [torch.rand(4, generator=hashed_generator(*numbers)) for numbers in ((1, 2), other)]
    assert not torch.equal(*streams)


@pytest.mark.parametrize("other", [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 23, 3), (2, 1, 3)])
def test_another_row_step_or_seed_draws_something_else(other):
    assert draw(*other) != draw(1, 2, 3)


@pytest.mark.parametrize(
    ("batch_size", "num_processes", "micro_batch_size", "expected"),
    [(256, 8, None, (32, 1)), (256, 8, 4, (4, 8)), (256, 1, 256, (256, 1)), (4, 4, None, (1, 1))],
)
def test_a_batch_is_split_over_processes_and_micro_steps(batch_size, num_processes, micro_batch_size, expected):
    assert split_batch(batch_size, num_processes, micro_batch_size) == expected


@pytest.mark.parametrize("arguments", [(256, 3, None), (256, 8, 5), (4, 8, None), (4, 1, 0)])
def test_a_batch_that_cannot_be_split_exactly_is_refused(arguments):
    with pytest.raises(ValueError, match="must be a multiple of"):
        split_batch(*arguments)


def test_rows_of_a_toy_batch_are_those_of_the_whole_batch():
    batches, whole = ToyBatches(ToyWorld(1), 5, seed=1), toy_images(ToyWorld(1), 5, hashed_generator(1, 7))
    assert torch.equal(batches(7, range(5)), whole)
    assert torch.equal(batches(7, range(2, 4)), whole[2:4])


class Counting:
    """Pixels that say where they are from, and a list of what was asked for."""

    def __init__(self):
        self.num_skipped, self.asked = {}, []

    def __call__(self, step: int, rows: range) -> torch.Tensor:
        self.asked.append((step, rows))
        return torch.tensor([step, *rows]) / 100


def test_reading_ahead_gives_the_rows_of_each_micro_step_and_reads_each_once():
    batches, rows = Counting(), [range(2), range(4, 6)]
    read = ReadAhead(batches, rows)
    found = [read(step, index) for step in (3, 4) for index in (0, 1)]
    expected = [(step, part) for step in (3, 4) for part in rows]
    assert all(torch.equal(a, Counting()(*b)) for a, b in zip(found, expected, strict=True))
    read.reader.shutdown()
    assert batches.asked == [*expected, (5, rows[0])]


def test_reading_ahead_can_go_elsewhere():
    read = ReadAhead(Counting(), [range(2)])
    read(3, 0)
    assert read(7, 0)[0] == 7 / 100


def test_held_out_scenes_are_the_same_at_every_step():
    held_out = ToyHeldOut(ToyWorld(1), 4, seed=1)
    assert torch.equal(held_out(0, range(1, 3)), held_out(9, range(4))[1:3])


@pytest.mark.parametrize("value", [-1.1, 1.1, 255.0, float("nan")])
def test_pixels_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        check_range(torch.tensor([0.0, value]))


def test_data_without_held_out_images_is_refused():
    stage = make_stage(Path("judges"), loss_weights=TokenizerLossWeights())
    stage = replace(stage, data=Sources((Source(task="generate", path="images"),)), held_out=None)
    recipe = Recipe(name="test", config=CONFIG, stages=(stage,))
    with pytest.raises(ValueError, match="needs held_out images too"):
        create_batches(recipe, stage, 0)


def test_a_folder_of_images_is_training_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for number in range(6):
        picture = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "images" / f"{number}.png")
    stage = make_stage(Path("judges"), loss_weights=TokenizerLossWeights())
    path = str(tmp_path / "images")
    train, held_out = (Sources((Source(task="generate", path=path, split=f"train[{part}]"),)) for part in ("2:", ":2"))
    stage = replace(stage, data=train, held_out=held_out, num_held_out=2)
    batches, held_out = create_batches(Recipe(name="test", config=CONFIG, stages=(stage,)), stage, 0)
    whole = check_range(batches(3, range(4)))
    assert whole.shape == (4, 3, 64, 64)
    assert torch.equal(batches(3, range(1, 3)), whole[1:3])
    assert held_out.images(0, range(2)).shape == (2, 3, 64, 64)


def test_a_step_has_images_of_one_size_and_all_sizes_have_as_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (90, 70), "red").save(tmp_path / "images" / "a.png")
    batches = ImageBatches((Source(task="generate", path=str(tmp_path / "images")),), (32, 64), 0, batch_size=2)
    sizes = [batches.size_of(step) for step in range(2000)]
    assert 0.77 < sizes.count(32) / 2000 < 0.83  # 1 - 1 / 5
    for size in (32, 64):
        assert batches(sizes.index(size), range(2)).shape == (2, 3, size, size)


def frames(num_frames: int, color: str = "red") -> list[Image.Image]:
    return [Image.new("RGB", (48, 32), color)] * num_frames


def test_clips_are_read_from_video_files_and_those_that_cannot_be_are_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "clips"
    write_video(folder / "long.mp4", frames(12), fps=10)
    write_video(folder / "short.mp4", frames(6, "blue"), fps=10)
    (folder / "damaged.mp4").write_bytes(b"not a video" * 50)
    data = Sources((Source(task="video_generate", path=str(folder)),))
    batches = data.clips(32, 9, 2, seed=0)
    whole = torch.cat([check_range(batches(step, range(2))) for step in range(4)])
    assert whole.shape == (8, 3, 9, 32, 32)
    assert (whole[:, 0] > 0.8).all()  # all red
    assert torch.equal(batches(1, range(1, 2)), whole[3:4])
    reasons = {key.rpartition(": ")[2] for key in batches.num_skipped}
    assert reasons == {"a clip of fewer than 9 frames", "a clip that cannot be decoded"}


def test_sources_without_clips_are_refused_where_clips_are_needed(tmp_path):
    with pytest.raises(ValueError, match="none of a task with videos"):
        Sources((Source(task="generate", path=str(tmp_path)),)).clips(32, 9, 2, seed=0)


def test_a_step_has_one_canvas_half_of_the_time_the_first_and_large_ones_less_often():
    generator = hashed_generator(0, 0)
    chosen = [choose_canvas(CANVASES, generator) for _ in range(3000)]
    assert set(chosen) == set(CANVASES)
    assert 0.47 < chosen.count((64, 64)) / len(chosen) < 0.53
    assert chosen.count((128, 128)) < chosen.count((48, 48))
    tokens = sum(height * width / 16**2 for height, width in chosen) / len(chosen)
    assert tokens < 22  # on the average of a step, 16 on the first canvas
    chosen = [choose_canvas(CANVASES, generator, first_share=0.25) for _ in range(3000)]
    assert 0.22 < chosen.count((64, 64)) / len(chosen) < 0.28
    batches = ToyBatches(ToyWorld(1), 5, seed=1, canvases=CANVASES)
    shapes = {tuple(batches(step, range(5)).shape) for step in range(40)}
    assert len(shapes) > 5
    assert all(shape[:2] == (5, 3) and shape[2:] in CANVASES for shape in shapes)


@pytest.mark.parametrize("number, num_processes", [(1, 1), (1, 3), (5, 2), (6, 3), (7, 4), (16, 5)])
def test_the_shares_of_processes_are_equal_and_make_up_the_whole(number, num_processes):
    shares = [share_of(number, index, num_processes) for index in range(num_processes)]
    assert {row for share in shares for row in share} == set(range(number))
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) * num_processes < number + num_processes
