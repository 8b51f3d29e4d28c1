"""What benchmarks of reconstruction take of a folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_hf.evaluation.crops import adm_crop, find_clips, find_images, read_clip_crop, read_crop, read_crops
from hydra_hf.files import write_video


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def test_a_picture_of_the_right_size_is_not_touched():
    image = picture(16, 16)
    assert (np.asarray(adm_crop(image, 16)) == np.asarray(image)).all()


def test_a_large_picture_is_halved_by_averages():
    image = picture(32, 32)
    means = np.asarray(image, dtype=float).reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(adm_crop(image, 16)) - means).max() <= 1  # Pillow rounds twice


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (17, 40), (100, 37)])
def test_the_middle_is_taken(size):
    height, width = size
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 3, height) if width > height else (0, 0, width, height // 3))
    crop = np.asarray(adm_crop(image, 12))
    assert crop.shape == (12, 12, 3)
    assert (crop[-1, -1] == 255).all()


def test_a_crop_is_in_the_tokenizers_range(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "a.png")  # transparent: white
    assert torch.equal(read_crop(tmp_path / "a.png", 16), torch.ones(3, 16, 16))


def test_a_limit_takes_images_of_all_classes(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
        for number in range(3):
            picture(16, 16).save(tmp_path / name / f"{number}.png")
    assert len(find_images(tmp_path)) == 12
    assert [path.parent.name for path in find_images(tmp_path, 4)] == ["a", "b", "c", "d"]
    assert len(find_images(tmp_path, 100)) == 12
    assert [batch.shape[0] for batch in read_crops(find_images(tmp_path, 5), 16, batch_size=2)] == [2, 2, 1]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no image"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        find_images(tmp_path / "nowhere")


def test_clips_are_files_or_folders_of_frames(tmp_path):
    frames = [Image.new("RGB", (16, 16), (10 * index, 0, 0)) for index in range(7)]
    davis, ucf = tmp_path / "davis", tmp_path / "ucf"
    for folder in (davis / "bear", davis / "camel", ucf):
        folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        for name in ("bear", "camel"):
            frame.save(davis / name / f"{index:05}.png")
    write_video(ucf / "walk.gif", frames, fps=10)
    assert [path.name for path in find_clips(davis)] == ["bear", "camel"]
    assert [path.name for path in find_clips(ucf)] == ["walk.gif"]
    clip = read_clip_crop(davis / "bear", 16, 5)
    assert clip.shape == (3, 5, 16, 16)
    torch.testing.assert_close(clip[0, :, 0, 0], torch.arange(5) * 10 / 127.5 - 1)  # the first five
    with pytest.raises(ValueError, match="walk.gif has 7 frames, expected at least 9"):
        read_clip_crop(ucf / "walk.gif", 16, 9)
