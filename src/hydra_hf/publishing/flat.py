"""One flat folder that holds model, processor and pipeline, so that transformers and diffusers both open it."""

import shutil
from pathlib import Path


COMPONENTS = ("model", "processor", "scheduler", "vision_tower", "image_processor")
SAMPLES = "samples"  # images for the card
NOT_PUBLISHED = ("*.tmp", "*.old", "*.lock", "*.py")


def flatten(source: Path, folder: Path) -> None:
    """Puts the files of a saved pipeline, or of one model, next to each other: copies, and links to the weights, which are large.

    Raises ValueError for two files of one name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (source, *(source / name for name in COMPONENTS)):
        for file in sorted(path.glob("*")):
            if not file.is_file() or any(file.match(pattern) for pattern in NOT_PUBLISHED):
                continue
            if (folder / file.name).exists():
                raise ValueError(f"{source} has two files {file.name!r}, expected one: they would be in one folder.")
            if file.suffix == ".safetensors":
                (folder / file.name).symlink_to(file.resolve())
            else:
                shutil.copyfile(file, folder / file.name)
    if (source / SAMPLES).is_dir():
        shutil.copytree(source / SAMPLES, folder / SAMPLES)
