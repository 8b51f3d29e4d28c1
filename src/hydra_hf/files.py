"""Files and folders that are complete or absent: written aside, flushed to the disk, then renamed. And a folder's lock."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from torch import Tensor


logger = logging.getLogger(__name__)

LOCK_SECONDS = 10  # the loader workers of a killed run hold its lock until they notice


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary folder next to `path`, which is then renamed to `path`: a killed run leaves the old one.

    Raises OSError, and leaves the old folder, if there is no room.
    """
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with saving(path, temporary):
        temporary.mkdir(parents=True)
        write(temporary)
        sync_folder(temporary)
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def saving(path: Path, temporary: Path) -> Iterator[None]:
    """Removes the folder `temporary` if it is not completed, and raises one OSError that says what could not be written."""
    from safetensors import SafetensorError

    try:
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


def has_folder(path: Path) -> bool:
    """Whether `write_folder` has written `path`; one that a killed run had set aside is put back."""
    old = path.with_name(path.name + ".old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    return path.exists()


def sync(path: Path) -> None:
    """Flushes a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flushes everything in a folder to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """`write` makes a file of the same name in a temporary folder next to `path`, which it then replaces.

    Nothing else is touched, and nothing is left behind if it fails or is interrupted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name[:40]}.", dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_image_grid(path: Path, pixel_values: Tensor, num_columns: int) -> None:
    """Writes images (B, 3, H, W) in [-1, 1], row by row, as one PNG."""
    from torchvision.utils import save_image

    pixels = (pixel_values.float().clamp(-1, 1) + 1) / 2
    write_file(path, lambda temporary: save_image(pixels, temporary, nrow=num_columns, pad_value=0.5))


def write_video(path: Path, frames: Sequence[Image.Image], fps: float) -> None:
    """
    A clip as MP4, GIF or WebP, by the ending of `path`; WebP loses nothing, GIF all but 256 colours of a frame.

    Args:
        frames: of one size; both sides are even for MP4.
        fps: frames a second; in a GIF at most 50, and the times are rounded to hundredths of a second.
    """
    writers = {".mp4": _write_mp4, ".gif": _write_animation, ".webp": _write_animation}
    if path.suffix.lower() not in writers:
        raise ValueError(f"{path} has the ending {path.suffix!r}, expected one of {', '.join(writers)}.")
    if len(sizes := {frame.size for frame in frames}) != 1:
        raise ValueError(f"Got {len(frames)} frames of the sizes {sorted(sizes)}, expected at least one, of one size.")
    max_fps = 50 if path.suffix.lower() == ".gif" else 1000  # players show a shorter frame of a GIF for longer
    if not 0 < fps <= max_fps:
        raise ValueError(f"Got {fps=} for {path.name}, expected more than 0 and at most {max_fps}.")
    frames = [frame.convert("RGB") for frame in frames]
    write_file(path, lambda temporary: writers[path.suffix.lower()](temporary, frames, fps))


def _write_mp4(path: Path, frames: list[Image.Image], fps: float) -> None:
    import av  # pip install hydra_hf[video]

    width, height = frames[0].size
    if width % 2 or height % 2:
        raise ValueError(f"{path.name} is {width}x{height}, but an MP4 has even sides: write .gif or .webp.")
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "15"})  # no loss that an eye would see
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def _write_animation(path: Path, frames: list[Image.Image], fps: float) -> None:
    unit = 10 if path.suffix.lower() == ".gif" else 1  # milliseconds
    ends = [round((index + 1) * 1000 / fps / unit) * unit for index in range(len(frames))]
    durations = [end - start for start, end in zip([0, *ends], ends)]  # rounding errors do not add up
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, lossless=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder for one process at a time; the lock of a process that has died does not count.

    Raises ValueError if another process holds the lock.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use by another run: wait until it has ended, or name another folder."
        ) from error
    except NotImplementedError:
        logger.warning("The file system of %s has no locks: do not start a second run in it.", folder)
    try:
        yield
    finally:
        lock.release()
