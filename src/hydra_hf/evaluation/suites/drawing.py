"""Pictures and clips of a suite, drawn to named files: each has its own seed, and a killed run is resumed by running it again."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from hydra_hf.data.seeds import hashed_generator
from hydra_hf.files import write_file, write_text, write_video
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline


SETTINGS = "settings.json"


@dataclass(frozen=True)
class Drawing:
    """
    One picture or clip to draw.

    Args:
        file: where to write it, relative to the suite's folder.
        prompt: what to draw, or the instruction of an edit.
        key: the numbers of prompt and sample, which its seed depends on.
        source: opens the image to edit.
    """

    file: str
    prompt: str
    key: tuple[int, ...]
    source: Callable[[], Image.Image] | None = None


def draw(
    pipeline: HydraPipeline,
    model: str,
    drawings: list[Drawing],
    folder: Path,
    *,
    seed: int,
    batch_size: int,
    fps: float = 8.0,
    **kwargs,
) -> dict:
    """Draws what `folder` does not have yet. Returns the settings that the pictures depend on, which the folder keeps.

    `kwargs` go to the pipeline. Raises ValueError if the folder has pictures of other settings.
    """  # fmt: skip
    settings = describe(pipeline, model, seed=seed, fps=fps if "num_frames" in kwargs else None, **kwargs)
    claim(folder, settings)
    missing = [drawing for drawing in drawings if not (folder / drawing.file).is_file()]
    with tqdm(total=len(drawings), initial=len(drawings) - len(missing), desc="drawn", unit="file") as bar:
        for batch in _batches(missing, batch_size):
            options = dict(kwargs)
            if batch[0].source is not None:
                options["image"] = [drawing.source() for drawing in batch]
            generators = [hashed_generator(seed, *drawing.key) for drawing in batch]
            prompts = [drawing.prompt for drawing in batch]
            (pictures,) = pipeline(prompts, generator=generators, return_dict=False, **options)
            for drawing, picture in zip(batch, pictures):
                write_drawn(folder / drawing.file, picture, fps)
            bar.update(len(batch))
    return settings


def _batches(drawings: list[Drawing], batch_size: int) -> list[list[Drawing]]:
    """Edits go one by one, since the size of a result follows its source."""
    batches = []
    for has_source, group in groupby(drawings, key=lambda drawing: drawing.source is not None):
        rows, size = list(group), 1 if has_source else batch_size
        batches += [rows[start : start + size] for start in range(0, len(rows), size)]
    return batches


def write_drawn(path: Path, picture, fps: float = 8.0) -> None:
    """Writes an image, or the frames of a clip, whole or not at all."""
    if isinstance(picture, Image.Image):
        write_file(path, picture.save)
    else:
        write_video(path, picture, fps)


def describe(pipeline: HydraPipeline, model: str, **options) -> dict:
    """What drawn pictures depend on: the weights, the pipeline's defaults where an option is None, and the options."""
    config = pipeline.config
    defaults = {
        "num_inference_steps": config.default_num_inference_steps,
        "guidance_scale": config.default_guidance_scale,
        "image_guidance_scale": config.default_image_guidance_scale,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return {
        "model": model,
        "weights": weights_digest(pipeline.model),
        "dtype": str(pipeline.model.dtype),
        **defaults,
        **given,
    }


def weights_digest(model: torch.nn.Module) -> str:
    """16 hex digits of the values of all parameters and buffers, in their own type."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def claim(folder: Path, settings: dict) -> None:
    """Writes the settings into the folder. Raises ValueError if it has those of another run; where the model is does not count."""
    path = folder / SETTINGS
    if not path.exists():
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    names = sorted((set(old) | set(settings)) - {"model"})
    if changed := [
        f"{name} {old.get(name)} -> {settings.get(name)}" for name in names if old.get(name) != settings.get(name)
    ]:
        raise ValueError(
            f"{folder} has results of other settings: {', '.join(changed)}. Name another --folder, or the same settings."
        )


def limited(rows: list, limit: int | None) -> list:
    """The first `limit` rows, or all. Raises ValueError if there are none."""
    if limit is not None and limit < 1:
        raise ValueError(f"Got {limit=}, expected at least 1.")
    if not rows:
        raise ValueError("The data have no rows.")
    return rows[:limit]


def file_digest(path: Path) -> str:
    """16 hex digits of a file's bytes."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
