"""Files and folders that are complete or absent: written aside, flushed to the disk, then renamed. And a folder's lock."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

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
