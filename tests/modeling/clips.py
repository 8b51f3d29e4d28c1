"""Small clips of known frames, written by PyAV and Pillow."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image


HEIGHT, WIDTH = 48, 64
MILLISECONDS = Fraction(1, 1000)


def moving_square(num_frames: int = 20, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frames (T, H, W, 3) in uint8: a white square moves to the right; a red one marks the top left corner."""
    frames = np.full((num_frames, height, width, 3), (0, 0, 160), np.uint8)
    frames[:, 4:20, 4:20] = (220, 40, 40)
    for index, frame in enumerate(frames):
        left = index * (width - 16) // max(num_frames - 1, 1)
        frame[26:42, left : left + 16] = 255
    return frames


def write_clip(
    path: Path, frames: np.ndarray, *, fps: int = 10, times: list[float] | None = None, codec: str = "libx264",
    matrix: tuple[int, int, int, int] | None = None, **options: str,
) -> Path:  # fmt: skip
    """Frames (T, H, W, 3), evenly spaced or at `times` in seconds.

    Args:
        matrix: (a, b, c, d) of the display matrix: a point (x, y) is shown at (ax + cy, bx + dy).
    """
    import av

    container_options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=fps, options={"threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = MILLISECONDS
        if matrix is not None:
            a, b, c, d = (value << 16 for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = round(1000 * (index / fps if times is None else times[index]))
            picture.time_base = MILLISECONDS
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def pil_frames(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


def psnr(levels: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean((levels.astype(float) - expected) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)
