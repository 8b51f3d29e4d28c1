import os

import numpy as np
import pytest
from PIL import Image

from hydra_hf import HydraVideoProcessor
from hydra_hf.files import write_file, write_text, write_video
from hydra_hf.modeling.video_reading import read_video


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


def square(num_frames: int = 9, height: int = 48, width: int = 64) -> list[Image.Image]:
    """A white square that moves over blue, and stands still at the end."""
    frames = [Image.new("RGB", (width, height), (0, 0, 160)) for _ in range(num_frames)]
    for index, frame in enumerate(frames):
        left = 2 * min(index, num_frames - 3)
        frame.paste("white", (left, 8, left + 16, 24))
    return frames


def levels(frames: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames])


def read(path, fps: float) -> tuple[np.ndarray, list[float]]:
    """Frames (T, H, W, 3) at a rate, and their times."""
    video_processor = HydraVideoProcessor()
    frames, metadata = read_video(path, lambda metadata: video_processor.sample_frames(metadata, fps=fps))
    return frames.permute(0, 2, 3, 1).numpy(), metadata.timestamps


@pytest.mark.parametrize("fps", [12, 8, 29.97])
@pytest.mark.parametrize(("name", "size"), [("clip.gif", (33, 47)), ("clip.webp", (33, 47)), ("clip.mp4", (48, 64))])
def test_a_clip_that_was_written_is_read_again(tmp_path, name, size, fps):
    write_video(tmp_path / name, square(17, *size), fps)
    frames, times = read(tmp_path / name, fps)
    error = (frames.astype(float) - levels(square(17, *size))) ** 2
    assert error.mean() < 255**2 / 10**3.5 if name == "clip.mp4" else error.max() == 0  # 35 dB
    moving = times[:15]  # GIF and WebP keep one frame of those that do not differ
    assert moving == pytest.approx([index / fps for index in range(15)], abs=0.0051)


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.mp4"])
def test_a_clip_of_one_frame_is_read_again(tmp_path, name):
    write_video(tmp_path / name, square(1), fps=10)
    assert read(tmp_path / name, fps=10)[0].shape == (1, 48, 64, 3)


def test_webp_loses_nothing_of_any_picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.webp", [Image.fromarray(frame) for frame in noise], fps=10)
    assert np.array_equal(read_video(tmp_path / "clip.webp")[0].permute(0, 2, 3, 1).numpy(), noise)


@pytest.mark.parametrize(
    ("name", "frames", "fps", "complaint"),
    [
        ("clip.avi", square(), 10, r"the ending '\.avi', expected one of \.mp4, \.gif, \.webp"),
        ("clip.mp4", square(2, 47), 10, r"clip\.mp4 is 64x47, but an MP4 has even sides"),
        ("clip.mp4", [], 10, "Got 0 frames"),
        ("clip.gif", [*square(1), *square(1, 20)], 10, "Got 2 frames of the sizes"),
        ("clip.gif", square(), 60, r"fps=60 for clip\.gif, expected more than 0 and at most 50"),
        ("clip.mp4", square(), 0, "fps=0"),
        ("clip.webp", square(), float("nan"), "fps=nan"),
    ],
)
def test_a_clip_that_cannot_be_written_leaves_the_old_file(tmp_path, name, frames, fps, complaint):
    path = tmp_path / name
    path.write_text("old")
    with pytest.raises(ValueError, match=complaint):
        write_video(path, frames, fps)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [(name, "old")]
