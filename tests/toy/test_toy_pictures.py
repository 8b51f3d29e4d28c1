import numpy as np
import torch
from PIL import Image

from hydra_hf.toy.clips import ToyClips, render_clips
from hydra_hf.toy.edits import ToyEdits, source_scenes, target_scenes
from hydra_hf.toy.pictures import SCALE, write_clip_strips, write_edit_rows
from hydra_hf.toy.world import ToyWorld


TILE, PAD = 64 * SCALE, 2  # torchvision's default padding


def tile(path, row: int, column: int) -> np.ndarray:
    left, top = (PAD + index * (TILE + PAD) for index in (column, row))
    return np.asarray(Image.open(path).crop((left, top, left + TILE, top + TILE)))


def levels(image: torch.Tensor) -> np.ndarray:
    """An image (3, H, W) in [-1, 1] as it is in a tile."""
    small = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
    return small.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def test_a_strip_has_every_fourth_frame_of_each_clip(tmp_path):
    clips = render_clips(ToyWorld(), ToyClips(ToyWorld()).sample(2, torch.Generator().manual_seed(0)))
    write_clip_strips(tmp_path / "strip.png", list(clips))
    assert Image.open(tmp_path / "strip.png").size == (5 * (TILE + PAD) + PAD, 2 * (TILE + PAD) + PAD)
    for row, column in ((0, 0), (1, 4), (1, 2)):
        assert abs(tile(tmp_path / "strip.png", row, column) - levels(clips[row, :, 4 * column])).max() <= 1


def test_a_row_of_edits_is_source_words_result(tmp_path):
    world = ToyWorld()
    edits = ToyEdits(world).sample(2, torch.Generator().manual_seed(0))
    sources, targets = world.render(source_scenes(edits)), world.render(target_scenes(edits))
    for name, texts in (("words", [edit.instruction for edit in edits]), ("blank", ["", ""])):
        write_edit_rows(tmp_path / f"{name}.png", sources, texts, targets)
    for row in range(2):
        assert abs(tile(tmp_path / "words.png", row, 0) - levels(sources[row])).max() <= 1
        assert abs(tile(tmp_path / "words.png", row, 2) - levels(targets[row])).max() <= 1
        assert (tile(tmp_path / "blank.png", row, 1) == 255).all()
        words = tile(tmp_path / "words.png", row, 1)
        assert words.min() < 64
        assert (words[:, :4] == 255).all()  # inside the picture
