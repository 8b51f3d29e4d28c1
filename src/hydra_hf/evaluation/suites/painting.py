"""What a model paints of a folder of images, against the targets that `hydra prepare unimrg` made. UniMRG, section 4.3."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from hydra_hf.data.painting import known_failures, target_paths, without_target
from hydra_hf.data.prompts import PROMPTS, choose_prompt
from hydra_hf.data.seeds import hashed_generator
from hydra_hf.data.tasks import TASKS
from hydra_hf.modeling import HydraImageProcessor
from hydra_hf.modeling.image_processing_hydra import read_image
from hydra_hf.pipelines.painting import paint
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from ..crops import MAX_PIXELS, find_images
from ..maps import map_scores
from ..report import SuiteResult


PAINTED = tuple(name for name, task in TASKS.items() if task.paint is not None)
Maps = dict[str, Tensor]  # task -> (1, 3, H, W) in [-1, 1]


def run(
    pipeline: HydraPipeline, model: str, *, data: Path, targets: Path, limit: int | None = None, batch_size: int = 16,
    num_inference_steps: int | None = None, seed: int = 0,
) -> SuiteResult:  # fmt: skip
    """Scores next to those of maps without information: `black`, the `mean` map, and that of `another` image, each resized.

    Images and targets are cropped and resized as in training; each image has one prompt of `PROMPTS` for each task.
    """
    paths, num_failed = find_painted(data, targets, limit)
    steps = num_inference_steps or pipeline.config.default_num_inference_steps
    processor, truth, painted = pipeline.processor, [], []
    for start in tqdm(range(0, len(paths), batch_size), desc="painted", unit="batch"):
        batch = [
            read_maps(data, targets, path, processor.image_processor) for path in paths[start : start + batch_size]
        ]
        truth += batch
        painted += paint_batch(pipeline, batch, start, steps, seed)
    scores = {f"painting/{name}": value for name, value in mean_scores(painted, truth).items()}
    for kind, maps in trivial_maps(truth).items():
        scores |= {f"painting_{kind}/{name}": value for name, value in mean_scores(maps, truth).items()}
    return SuiteResult(
        "painting", model, scores,
        protocol={"num_inference_steps": steps, "guidance_scale": 1.0, "prompts": "hydra_hf.data.prompts.PROMPTS",
                  "depth": "relative, stretched to the range of each crop", "data": data.name, "targets": targets.name},
        seeds={"seed": seed}, counts={"images": len(paths), "without_target": num_failed},
        notes=["The targets are those of the models that `hydra prepare unimrg` was run with: compare only with the same."],
    )  # fmt: skip


def find_painted(data: Path, targets: Path, limit: int | None) -> tuple[list[str], int]:
    """The images that have both targets, relative to `data`, and how many are left out because no target could be made.

    Raises ValueError for images whose targets are missing.
    """
    paths, failed = [str(path.relative_to(data)) for path in find_images(data, limit)], set()
    for task in (name for name in PAINTED if TASKS[name].target):
        folder = targets / TASKS[task].target
        if not folder.is_dir():
            raise ValueError(
                f"{folder} is not a folder, expected the targets that `hydra prepare unimrg` writes there."
            )
        failed |= set(known_failures(folder)) & set(paths)
        if missing := without_target((path for path in paths if path not in failed), folder):
            raise ValueError(
                f"{len(missing)} of {len(paths)} images have no target in {folder}, such as {missing[0]}."
            )
    paths = [path for path in paths if path not in failed]
    if not paths:
        raise ValueError(f"None of the images in {data} has targets in {targets}.")
    return paths, len(failed)


def read_maps(data: Path, targets: Path, path: str, image_processor: HydraImageProcessor) -> Maps:
    """What should be painted of an image, at the size at which training paints it."""
    image = read_image(data / path, MAX_PIXELS)
    height, width = image_processor.generated_size(image.height, image.width)
    files = {"": image} | {name: read_image(target_file(targets / name, path), MAX_PIXELS) for name in target_names()}
    return {
        task: TASKS[task].paint(files[TASKS[task].target], height, width, image_processor)[None] for task in PAINTED
    }


def target_names() -> Iterator[str]:
    return (TASKS[task].target for task in PAINTED if TASKS[task].target)


def target_file(folder: Path, path: str) -> Path:
    return next(folder / name for name in target_paths(path) if (folder / name).is_file())


def paint_batch(pipeline: HydraPipeline, truth: list[Maps], start: int, steps: int, seed: int) -> list[Maps]:
    """What the model paints of each image."""
    processor, painted = pipeline.processor, [{} for _ in truth]
    images: list[Image.Image] = [
        processor.image_processor.postprocess(maps["reconstruct"], output_type="pil")[0] for maps in truth
    ]
    for number, task in enumerate(PAINTED):
        prompts = [choose_prompt(task, PROMPTS[task], seed, start + index) for index in range(len(truth))]
        generator = hashed_generator(seed, start, number)
        pictures = paint(pipeline.model, processor, images, prompts, num_inference_steps=steps, generator=generator)
        for maps, picture in zip(painted, pictures, strict=True):
            maps[task] = picture.cpu().clamp(-1, 1)[None]
    return painted


def trivial_maps(truth: list[Maps]) -> dict[str, list[Maps]]:
    """What a painter that sees nothing could paint; maps of other sizes are resized."""
    size = truth[0]["reconstruct"].shape[-2:]
    mean = {
        task: torch.cat([_resized(maps[task], size) for maps in truth]).mean(dim=0, keepdim=True) for task in PAINTED
    }
    others = truth[-1:] + truth[:-1]

    def fitted(maps: Maps, like: Maps) -> Maps:
        return {task: _resized(maps[task], like[task].shape[-2:]) for task in PAINTED}

    return {
        "black": [{task: torch.full_like(pixels, -1.0) for task, pixels in maps.items()} for maps in truth],
        "mean": [fitted(mean, maps) for maps in truth],
        "another": [fitted(other, maps) for other, maps in zip(others, truth)],
    }


def _resized(pixels: Tensor, size: torch.Size) -> Tensor:
    return pixels if pixels.shape[-2:] == size else interpolate(pixels, tuple(size), mode="bilinear", antialias=True)


def mean_scores(painted: list[Maps], truth: list[Maps]) -> dict[str, float]:
    """The means of `map_scores` over images."""
    rows = [map_scores(maps, expected) for maps, expected in zip(painted, truth, strict=True)]
    return {name: sum(row[name].item() for row in rows) / len(rows) for name in rows[0]}
