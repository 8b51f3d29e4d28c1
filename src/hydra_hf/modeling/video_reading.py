"""Clips from files and folders: upright frames, and when each of them is shown.

transformers' `load_video` takes frames by their number, as if all were shown equally long, leaves rotated clips lying on their
side, and needs a count of frames in the file's header, which WebM has not.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers.video_utils import VideoMetadata

from .image_processing_hydra import check_image_size, fetch_url, pil_to_levels, read_image


ANIMATIONS = ("GIF", "WEBP", "PNG")  # what Pillow reads with its transparency and the durations of its frames
SECONDS_OF_A_FRAME = 0.1  # where an animation says 0, as browsers show it


@dataclass
class ClipMetadata(VideoMetadata):
    """
    transformers' `VideoMetadata`, for frames that need not be shown equally long; `fps` is their average.

    Args:
        frame_times: when each frame of the whole clip is shown, in seconds after the first; None where nothing says so.
        num_lost_frames: frames that are damaged or missing in the file, not counted in `total_num_frames`.
    """

    frame_times: list[float] | None = None
    num_lost_frames: int = 0

    @property
    def timestamps(self) -> list[float]:
        """When the sampled frames are shown, in seconds after the clip's first. ValueError where nothing says so."""
        if self.frame_times is None or self.frames_indices is None:
            return super().timestamps
        return [self.frame_times[index] for index in self.frames_indices]


FramesAt = Callable[[Sequence[int]], list[Tensor]]
"""Levels (3, H, W) of the frames of these numbers; a number may come twice."""


def read_video(
    source: str | Path | BytesIO,
    sample_indices_fn: Callable[..., Sequence[int]] | None = None,
    max_input_pixels: int = 178_956_970,
) -> tuple[Tensor, ClipMetadata]:
    """
    Upright frames of a clip as RGB levels 0 to 255, (T, 3, H, W) in uint8, and what is known of them.

    Args:
        source: path or URL of a video (PyAV), of a GIF, WebP or PNG (Pillow), the content of such a file, or a folder of pictures
            in the order of their names.
        sample_indices_fn: the numbers of the wanted frames for `metadata=`, as in transformers' `load_video`; None is all.
        max_input_pixels: a clip whose frames have more pixels is refused before it is decoded.

    Raises ValueError for what is no clip or has no frame that can be decoded, ConnectionError for a URL that cannot be fetched.
    """
    with _named(source):
        metadata, frames_at = _open(source, max_input_pixels)
        if not metadata.total_num_frames:
            raise ValueError("no frame can be decoded")
    indices = range(metadata.total_num_frames) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
    metadata.frames_indices = [int(index) for index in indices]
    with _named(source):
        frames = stack_frames(frames_at(metadata.frames_indices))
    metadata.height, metadata.width = frames.shape[-2:]
    return frames, metadata


def stack_frames(frames: Sequence[Tensor] | Sequence[np.ndarray]) -> Tensor | np.ndarray:
    """A clip (T, ...) of frames of one shape. ValueError for several."""
    if len(shapes := {tuple(frame.shape) for frame in frames}) != 1:
        raise ValueError(f"Got frames of the shapes {sorted(shapes)}, expected one shape in a clip.")
    return np.stack(frames) if isinstance(frames[0], np.ndarray) else torch.stack(frames)


@contextmanager
def _named(source: str | Path | BytesIO) -> Iterator[None]:
    """Says of which clip an error speaks."""
    try:
        yield
    except ConnectionError:
        raise
    except (ValueError, SyntaxError, EOFError, OSError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError) and error.errno is not None:
            raise  # the file system, not the clip
        reason = str(error).rstrip(".")
        name = "The content of a file" if isinstance(source, BytesIO) else repr(str(source))
        raise ValueError(f"{name} cannot be read as a clip: {reason}.") from error


def _open(source: str | Path | BytesIO, max_input_pixels: int) -> tuple[ClipMetadata, FramesAt]:
    if isinstance(source, BytesIO):
        file = source
    elif str(source).startswith(("http://", "https://")):
        file = fetch_url(str(source))
    else:
        file = Path(source)
        if not file.exists():
            raise ValueError("there is no such file or folder")
        if file.is_dir():
            return _open_folder(file, max_input_pixels)
        if not file.stat().st_size:
            raise ValueError("the file is empty")
    try:
        image = Image.open(file, formats=ANIMATIONS)
    except UnidentifiedImageError:
        return _open_stream(file, max_input_pixels)
    return _open_animation(image, max_input_pixels)


# Folders


def _open_folder(folder: Path, max_input_pixels: int) -> tuple[ClipMetadata, FramesAt]:
    endings = Image.registered_extensions()
    files = [path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith(".")]
    files.sort(key=_in_counting_order)
    if not files:
        raise ValueError("the folder holds no pictures")

    def frames_at(indices: Sequence[int]) -> list[Tensor]:
        return [pil_to_levels(read_image(files[index], max_input_pixels)) for index in indices]

    return ClipMetadata(total_num_frames=len(files), video_backend="pillow"), frames_at


def _in_counting_order(path: Path) -> list[str | int]:
    """Sorts 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


# GIF, WebP, PNG


def _open_animation(image: Image.Image, max_input_pixels: int) -> tuple[ClipMetadata, FramesAt]:
    check_image_size(image.height, image.width, max_input_pixels)
    times, end, is_damaged = [], 0.0, False
    while not is_damaged:
        try:
            image.seek(len(times))
            image.load()
        except EOFError:
            break
        except Exception:  # the decoders of damaged files raise nearly everything
            is_damaged = True  # each frame is painted over the one before: there are no more
        else:
            times.append(end)
            end += image.info.get("duration", 0) / 1000 or SECONDS_OF_A_FRAME
    num_promised = (
        len(times) + is_damaged if image.format == "GIF" else image.n_frames
    )  # a GIF has no header that counts

    def frames_at(indices: Sequence[int]) -> list[Tensor]:
        levels = {}
        for index in sorted({*indices}):
            image.seek(index)
            levels[index] = pil_to_levels(image)
        return [levels[index] for index in indices]

    return _metadata(times, end, "pillow", num_promised - len(times)), frames_at


def _metadata(times: list[float], duration: float, backend: str, num_lost_frames: int) -> ClipMetadata:
    return ClipMetadata(
        total_num_frames=len(times),
        fps=len(times) / duration if duration else None,
        duration=duration,
        video_backend=backend,
        frame_times=times,
        num_lost_frames=num_lost_frames,
    )


# Videos


def _open_stream(file: Path | BytesIO, max_input_pixels: int) -> tuple[ClipMetadata, FramesAt]:
    """Decodes all frames once for their times, and without keeping them: headers promise what the file may not hold."""
    times, end, num_lost_frames = [], 0.0, 0
    for frame in _decoded(file, max_input_pixels):
        if frame is None:
            num_lost_frames += 1
            continue
        if frame.time is None or (times and frame.time < times[-1]):
            raise ValueError("its frames have no times in their order to be shown at")
        times.append(frame.time)
        end = frame.time + float(frame.duration * frame.time_base)
    if len(times) > 1 and end == times[-1]:  # the last frame does not say how long it is shown
        end += (times[-1] - times[0]) / (len(times) - 1)
    times, duration = [time - times[0] for time in times], end - times[0] if times else 0.0

    def frames_at(indices: Sequence[int]) -> list[Tensor]:
        levels = {}
        whole = (frame for frame in _decoded(file, max_input_pixels) if frame is not None)
        for index, frame in zip(range(max(indices) + 1), whole):
            if index in {*indices}:
                levels[index] = _upright_levels(frame)
        return [levels[index] for index in indices]

    return _metadata(times, duration, "pyav", num_lost_frames), frames_at


def _decoded(file: Path | BytesIO, max_input_pixels: int) -> Iterator:
    """The video's frames of PyAV in the order in which they are shown, None for each that is damaged or missing."""
    try:  # so that code in a repo of the Hub does not need it for images
        import av
        from av.stream import Disposition
    except ImportError as error:
        raise ImportError("Reading clips needs PyAV: pip install hydra_hf[video], or pip install av.") from error

    if isinstance(file, BytesIO):
        file.seek(0)
    try:
        with av.open(str(file.absolute()) if isinstance(file, Path) else file) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise ValueError("it has no video, only sound or nothing")
            if streams[0].codec_context is None:
                raise ValueError("its codec is unknown")
            check_image_size(streams[0].height, streams[0].width, max_input_pixels)
            num_missing = streams[0].frames if "mp4" in container.format.name else 0  # others only guess
            for packet in container.demux(streams[0]):
                num_missing -= packet.size > 0
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    yield None
                    continue
                yield from (None if frame.is_corrupt else frame for frame in frames)
            yield from [None] * num_missing
    except av.error.FFmpegError as error:
        raise ValueError(error.strerror) from error


def _upright_levels(frame) -> Tensor:
    """RGB levels (3, H, W) of a frame, turned and mirrored as the display matrix of its file says."""
    levels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return levels
    (a, b), (c, d) = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2]  # (x, y) goes to (ax + cy, bx + dy)
    if abs(b) > abs(a):  # rows become columns
        levels, a, d = levels.transpose(1, 2), c, b
    return levels.flip([axis for axis, scale in ((2, a), (1, d)) if scale < 0])
