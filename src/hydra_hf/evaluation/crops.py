"""Images and clips of a folder as benchmarks of reconstruction take them: square crops from the middle."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hydra_hf.modeling.image_processing_hydra import normalize_levels, pil_to_levels, read_image
from hydra_hf.modeling.video_reading import read_video


IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CLIPS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
MAX_PIXELS = 178_956_970  # Pillow's own limit


def find_images(folder: Path, limit: int | None = None) -> list[Path]:
    """The images anywhere in a folder, in the order of their names; `limit` of them at even distances, so that all classes take part.

    Raises ValueError if there is none.
    """
    return _spread([path for path in _files(folder) if path.suffix.lower() in IMAGES], folder, "image", limit)


def find_clips(folder: Path, limit: int | None = None) -> list[Path]:
    """The same of clips: video files, or the folders that hold the frames of one clip each, as in DAVIS."""
    files = _files(folder)
    clips = [path for path in files if path.suffix.lower() in CLIPS]
    clips = clips or sorted({path.parent for path in files if path.suffix.lower() in IMAGES})
    return _spread(clips, folder, "clip", limit)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder, expected one with images or clips.")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _spread(paths: list[Path], folder: Path, kind: str, limit: int | None) -> list[Path]:
    if not paths:
        raise ValueError(f"{folder} has no {kind}.")
    if limit is None or limit >= len(paths):
        return paths
    if limit < 1:
        raise ValueError(f"Got {limit=}, expected at least 1.")
    return [paths[index * len(paths) // limit] for index in range(limit)]


def read_crops(paths: list[Path], size: int, batch_size: int, num_frames: int | None = None) -> Iterator[Tensor]:
    """Batches of images (B, 3, size, size) in [-1, 1], or of the first `num_frames` of clips, (B, 3, T, size, size)."""
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        if num_frames is None:
            yield torch.stack([read_crop(path, size) for path in batch])
        else:
            yield torch.stack([read_clip_crop(path, size, num_frames) for path in batch])


def read_crop(path: Path, size: int) -> Tensor:
    """The crop (3, size, size) of an image, in [-1, 1]."""
    return _crop_levels(pil_to_levels(read_image(path, MAX_PIXELS)), size)


def read_clip_crop(path: Path, size: int, num_frames: int) -> Tensor:
    """The crops (3, T, size, size) of the first frames of a clip, in [-1, 1]. Raises ValueError for a shorter clip."""

    def first(metadata) -> range:
        if metadata.total_num_frames < num_frames:
            raise ValueError(f"{path} has {metadata.total_num_frames} frames, expected at least {num_frames}.")
        return range(num_frames)

    frames, _ = read_video(path, first, MAX_PIXELS)
    return torch.stack([_crop_levels(frame, size) for frame in frames], dim=1)


def _crop_levels(levels: Tensor, size: int) -> Tensor:
    """The crop (3, size, size), in [-1, 1], of RGB levels (3, H, W)."""
    image = Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).numpy())
    return normalize_levels(pil_to_levels(adm_crop(image, size)))


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of `size` px of an image whose shorter side is brought to `size`: halved by averages of 2 x 2 pixels as
    long as it is twice as long, then bicubic, as in ADM."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
