from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import moving_square, pil_frames, psnr, write_clip
from huggingface_hub import close_session
from PIL import Image
from transformers.video_utils import load_video

from hydra_hf.modeling.video_reading import ClipMetadata, read_video


pytest.importorskip("av")

UNEVEN = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.5, 2.5, 3.5]  # seconds


def array(frames: torch.Tensor) -> np.ndarray:
    """(T, H, W, 3)."""
    assert frames.dtype == torch.uint8
    return frames.permute(0, 2, 3, 1).numpy()


def installed(package: str, path: str) -> Path:
    """A clip that comes with an installed package."""
    spec = find_spec(package)
    if spec is None or not (file := Path(spec.submodule_search_locations[0], path)).is_file():
        pytest.skip(f"{package} with {path} is not installed")
    return file


@pytest.mark.parametrize(
    ("name", "codec"), [("clip.mp4", "libx264"), ("clip.webm", "libvpx-vp9"), ("clip.mkv", "ffv1"), ("clip.ts", "libx264"),
                        ("clip.avi", "mpeg4")]
)  # fmt: skip
def test_a_clip_is_its_frames_and_their_times(tmp_path, name, codec):
    frames, metadata = read_video(write_clip(tmp_path / name, moving_square(), codec=codec))
    assert psnr(array(frames), moving_square()) > 25
    assert metadata.timestamps == pytest.approx([index / 10 for index in range(20)])
    assert (metadata.total_num_frames, metadata.height, metadata.width, metadata.num_lost_frames) == (20, 48, 64, 0)
    assert (metadata.fps, metadata.duration) == pytest.approx((10, 2))


def test_frames_that_are_shown_unequally_long_have_their_own_times(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", moving_square(9), times=UNEVEN)
    _, metadata = read_video(clip, lambda metadata: [0, 3, 8])
    assert metadata.timestamps == pytest.approx([0, 0.3, 3.5])
    assert metadata.frame_times == pytest.approx(UNEVEN)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
        ((1, 0, 0, -1), lambda frames: frames[:, ::-1]),
        ((-1, 0, 0, -1), lambda frames: np.rot90(frames, 2, axes=(1, 2))),
        ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, axes=(1, 2))),
        ((0, -1, 1, 0), lambda frames: np.rot90(frames, 1, axes=(1, 2))),
        ((0, 1, 1, 0), lambda frames: frames.swapaxes(1, 2)),
        ((0, -1, -1, 0), lambda frames: np.rot90(frames.swapaxes(1, 2), 2, axes=(1, 2))),
        ((1, 0, 0, 1), lambda frames: frames),
    ],
    ids=["mirrored", "upside down", "180", "clockwise", "anticlockwise", "transposed", "transverse", "upright"],
)
def test_a_clip_is_turned_and_mirrored_as_its_file_says(tmp_path, matrix, shown):
    frames, metadata = read_video(write_clip(tmp_path / "clip.mp4", moving_square(3), matrix=matrix))
    expected = shown(moving_square(3))
    assert psnr(array(frames), expected) > 25
    assert (metadata.height, metadata.width) == expected.shape[1:3]


def test_a_clip_that_a_phone_held_upright_filmed_is_upright(tmp_path):
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.set_display_rotation(-90)  # FFmpeg's counts anticlockwise
        container.mux(stream.encode(av.VideoFrame.from_ndarray(moving_square(1)[0], format="rgb24")))
        container.mux(stream.encode())
    frames, _ = read_video(path)
    assert psnr(array(frames)[0], np.rot90(moving_square(1)[0], -1)) > 25


def test_the_frames_of_a_real_clip_are_those_of_transformers():
    path = str(installed("gradio", "media_assets/videos/b.mp4"))
    expected, _ = load_video(path, num_frames=5)
    frames, metadata = read_video(path, lambda metadata: [0, 30, 60, 90, 120])
    assert np.array_equal(array(frames), expected)
    assert metadata.timestamps == pytest.approx([0, 1, 2, 3, 4])


def test_a_real_animation_is_what_ffmpeg_shows():
    import av

    path = installed("skimage", "data/no_time_for_that_tiny.gif")
    with av.open(str(path)) as container:
        shown = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    frames, metadata = read_video(path)
    assert np.array_equal(array(frames), np.stack([frame for _, frame in shown]))
    assert metadata.timestamps == pytest.approx([time for time, _ in shown])


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png"])
def test_an_animation_is_its_frames_and_their_times(tmp_path, name):
    first, *others = pil_frames(moving_square(6))
    durations = [100, 100, 100, 300, 300, 300]
    first.save(tmp_path / name, save_all=True, append_images=others, duration=durations, lossless=True)
    frames, metadata = read_video(tmp_path / name, lambda metadata: [5, 0, 3, 3])
    assert np.array_equal(array(frames), moving_square(6)[[5, 0, 3, 3]])
    assert metadata.timestamps == pytest.approx([0.9, 0, 0.3, 0.3])
    assert metadata.duration == pytest.approx(1.2)


def test_a_clear_animation_lies_over_white_and_runs_at_the_speed_of_browsers(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    dot = clear.copy()
    dot.putpixel((0, 0), (0, 0, 0, 255))
    clear.save(tmp_path / "clip.gif", save_all=True, append_images=[dot], disposal=2)
    frames, metadata = read_video(tmp_path / "clip.gif")
    assert frames[0].eq(255).all()
    assert frames[1].eq(0).sum() == 3
    assert metadata.timestamps == pytest.approx([0, 0.1])


@pytest.mark.parametrize("name", ["clip.mp4", "clip.png", "clip.gif", "clip.jpg"])
def test_one_frame_is_a_clip(tmp_path, name):
    frames = moving_square(1)
    write_clip(tmp_path / name, frames) if name == "clip.mp4" else Image.fromarray(frames[0]).save(tmp_path / name)
    read, metadata = read_video(tmp_path / name)
    assert psnr(array(read), frames) > 25
    assert metadata.timestamps == [0]


def test_a_folder_is_read_in_counting_order(tmp_path):
    for index, picture in enumerate(pil_frames(moving_square(12))):
        picture.save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    frames, metadata = read_video(tmp_path)
    assert np.array_equal(array(frames), moving_square(12))
    assert metadata.total_num_frames == 12
    with pytest.raises(ValueError, match="timestamps"):
        metadata.timestamps  # noqa: B018
    Image.new("RGB", (5, 5)).save(tmp_path / "frame13.png")
    with pytest.raises(ValueError, match=r"cannot be read as a clip: Got frames of the shapes .*\(3, 5, 5\)"):
        read_video(tmp_path)


def truncated(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def noisy_clip(num_frames: int, seed: int = 0) -> np.ndarray:
    """Frames whose encoding has some size: a file of them can be cut between two."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(("name", "promises"), [("clip.mp4", True), ("clip.webm", False)])
def test_a_clip_without_its_end_is_what_there_is_of_it(tmp_path, name, promises):
    codec = {"clip.mp4": "libx264", "clip.webm": "libvpx-vp9"}[name]
    clip = write_clip(tmp_path / name, noisy_clip(20), codec=codec, g="1")
    whole, _ = read_video(clip)
    frames, metadata = read_video(truncated(clip, 0.6))
    assert 8 < len(frames) < 16
    assert torch.equal(frames, whole[: len(frames)])
    assert metadata.total_num_frames == len(frames)
    assert metadata.num_lost_frames == (20 - len(frames) if promises else 0)


def test_damaged_frames_in_the_middle_are_left_out_and_counted(tmp_path):
    import av

    clip = write_clip(tmp_path / "clip.mp4", noisy_clip(10), g="1")
    whole, _ = read_video(clip)
    with av.open(str(clip)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][4]
        start, size = packet.pos, packet.size
    data = bytearray(clip.read_bytes())
    data[start : start + size] = bytes(size)
    clip.write_bytes(data)
    frames, metadata = read_video(clip)
    assert torch.equal(frames, torch.cat([whole[:4], whole[5:]]))
    assert metadata.num_lost_frames == 1
    assert metadata.timestamps == pytest.approx([0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9])


def test_an_animation_without_its_end_is_what_there_is_of_it(tmp_path):
    first, *others = pil_frames(noisy_clip(8))
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others, duration=100)
    whole, _ = read_video(tmp_path / "clip.gif")
    frames, metadata = read_video(truncated(tmp_path / "clip.gif", 0.6))
    assert torch.equal(frames, whole[: len(frames)])
    assert (len(frames), metadata.num_lost_frames) == (4, 1)


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png", "clip.mp4", "clip.webm"])
def test_damage_anywhere_leaves_a_clip_or_one_line(tmp_path, name):
    frames, path, rng = noisy_clip(6)[:, :32, :32], tmp_path / name, np.random.default_rng(0)
    if name in ("clip.mp4", "clip.webm"):
        write_clip(path, frames, codec="libx264" if name == "clip.mp4" else "libvpx-vp9", g="2")
    else:
        first, *others = pil_frames(frames)
        first.save(path, save_all=True, append_images=others, duration=100, lossless=True)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    num_read, complaints = 0, []
    for trial in range(45):
        damaged = whole[: rng.integers(len(whole))].copy() if trial % 3 == 0 else whole.copy()
        places = rng.integers(
            len(damaged) if trial % 3 == 1 else min(len(damaged), 300), size=5 if len(damaged) else 0
        )
        damaged[places] = rng.integers(256, size=len(places))
        path.write_bytes(damaged.tobytes())
        try:
            num_read += len(read_video(path, max_input_pixels=10**6)[0]) > 0
        except ValueError as error:
            complaints.append(str(error))
    assert num_read > 0
    assert complaints
    assert all(name in complaint and "\n" not in complaint for complaint in complaints)


def with_an_unknown_codec(path: Path) -> None:
    write_clip(path, moving_square(2))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def sound(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16_000
        container.mux([*stream.encode(silence), *stream.encode()])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "there is no such file or folder"),
        (lambda path: path.mkdir(), "the folder holds no pictures"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("a cat " * 100), "Invalid data found"),
        (sound, "it has no video"),
        (with_an_unknown_codec, "its codec is unknown"),
        (lambda path: truncated(write_clip(path, moving_square(), movflags=""), 0.02), "Invalid data|no video"),
        (lambda path: truncated(write_clip(path, moving_square()), 0.5), "no frame can be decoded"),
    ],
    ids=[
        "not there",
        "empty folder",
        "empty",
        "text",
        "sound",
        "unknown codec",
        "header alone",
        "first frame damaged",
    ],
)
def test_what_is_no_clip_is_one_line_that_names_it(tmp_path, make, reason):
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(ValueError, match=rf"clip\.mp4' cannot be read as a clip: .*({reason})") as caught:
        read_video(path)
    assert "\n" not in str(caught.value)


def test_a_clip_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    write_clip(tmp_path / "clip.mp4", moving_square(2))
    Image.new("RGB", (64, 48)).save(tmp_path / "clip.gif")
    for name in ("clip.mp4", "clip.gif"):
        with pytest.raises(ValueError, match=rf"{name}.*48x64.*max_input_pixels=3000"):
            read_video(tmp_path / name, max_input_pixels=3000)


def test_a_clip_of_a_server_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    close_session()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/clip\.mp4' cannot be fetched"):
        read_video("http://127.0.0.1:9/clip.mp4")
    close_session()


def test_a_clip_of_the_network_is_read_from_memory(tmp_path, monkeypatch):
    from io import BytesIO

    clip = write_clip(tmp_path / "clip.mp4", moving_square())
    monkeypatch.setattr("hydra_hf.modeling.video_reading.fetch_url", lambda url: BytesIO(clip.read_bytes()))
    frames, _ = read_video("https://example.com/clip.mp4")
    assert torch.equal(frames, read_video(clip)[0])


def test_times_are_known_from_a_rate_too():
    assert ClipMetadata(total_num_frames=9, fps=10, frames_indices=[0, 4]).timestamps == pytest.approx([0, 0.4])
