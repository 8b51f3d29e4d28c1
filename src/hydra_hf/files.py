"""Files and folders that are whole or not there: written aside, then renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary folder next to `path`, which then takes its name: a killed run leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def has_folder(path: Path) -> bool:
    """Whether `write_folder` has written `path`; one that a killed run had set aside comes back."""
    old = path.with_name(path.name + ".old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    return path.exists()


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """`write` makes a temporary file of the same ending next to `path`, which then takes its name; a failed one is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_image_grid(path: Path, pixel_values: Tensor, num_columns: int) -> None:
    """Pictures (B, 3, H, W) in [-1, 1], row by row, as a PNG."""
    from torchvision.utils import save_image

    pixels = (pixel_values.float().clamp(-1, 1) + 1) / 2
    write_file(path, lambda temporary: save_image(pixels, temporary, nrow=num_columns, pad_value=0.5))
