"""How alike a tokenizer's features for generation and for understanding are (CKNNA, t-SNE), and each layer and its teacher's."""

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hydra_hf.modeling import HydraTokModel
from hydra_hf.training.teachers import load_teacher

from ..crops import find_images, read_crops
from ..report import SuiteResult, package_versions
from ..representation import cknna, layer_features, patch_mean, write_tsne


NUM_IMAGES = 10_000  # of HYDRA's figures, from ImageNet's validation set


def run(
    vision_tower: HydraTokModel, model: str, *, data: Path, folder: Path | None = None, limit: int | None = None,
    size: int | None = None, teacher: str | None = None, num_neighbors: int = 10, num_classes: int = 10, seed: int = 0,
    batch_size: int = 16,
) -> SuiteResult:  # fmt: skip
    """Compares features of the images in `data`, whose folders are their classes.

    `folder` gets `tsne.png`, a t-SNE map of `num_classes` classes; `size` is that of the model's position table by default.
    """
    size = size or vision_tower.config.image_size
    judge = load_teacher(teacher).to(vision_tower.device) if teacher else None
    paths = find_images(data, limit)
    features = defaultdict(list)
    for pixel_values in tqdm(read_crops(paths, size, batch_size), total=-(-len(paths) // batch_size), desc="seen"):
        for name, values in all_features(vision_tower, judge, pixel_values).items():
            features[name].append(values)
    features = {name: torch.cat(parts) for name, parts in features.items()}
    scores = {"cknna": cknna(features["generation"], features["understanding"], num_neighbors)}
    for name in features:
        if teacher and name.startswith("layer_"):
            scores[f"cknna_teacher/{name}"] = cknna(features[name], features[f"teacher/{name}"], num_neighbors)
    if folder is not None:
        write_map(folder / "tsne.png", features, [path.parent.name for path in paths], num_classes, seed)
    notes = [] if len(paths) == NUM_IMAGES else [f"{len(paths)} images, not the {NUM_IMAGES} of the paper."]
    notes.append(
        "The paper does not say which features it compares: here means over patches of the bottleneck and of Sem-ViT."
    )
    return SuiteResult(
        "representation", model, scores,
        protocol={
            "crop": "ADM, middle square", "size": size, "num_neighbors": num_neighbors, "teacher": teacher,
            "generation": "bottleneck's mean", "understanding": "output of Sem-ViT", "pooling": "mean over patches",
            "dtype": str(vision_tower.dtype),
        },
        seeds={"seed": seed}, counts={"images": len(paths)}, notes=notes,
        versions=package_versions(*(["scikit-learn", "matplotlib"] if folder else [])),
    )  # fmt: skip


@torch.no_grad()
def all_features(tower: HydraTokModel, teacher: torch.nn.Module | None, pixel_values: Tensor) -> dict[str, Tensor]:
    """`layer_features`, and with a teacher its `teacher/layer_1` and so on; it sees the student's normalised pixels."""
    features = layer_features(tower, pixel_values)
    if teacher is not None:
        layers = tuple(range(1, tower.config.num_gen_layers + tower.config.num_sem_layers + 1))
        pixels = tower.normalize_pixels(pixel_values.to(tower.device))
        num_patches = (pixels.shape[-2] // teacher.patch_size) * (pixels.shape[-1] // teacher.patch_size)
        for number, states in zip(layers, teacher(pixels, layers)):
            features[f"teacher/layer_{number}"] = patch_mean(states, num_patches)
    return features


def write_map(path: Path, features: dict[str, Tensor], labels: list[str], num_classes: int, seed: int) -> None:
    """A t-SNE map of the two features of the first classes, each scaled to length 1."""
    chosen = sorted(set(labels))[:num_classes]
    rows = [row for row, label in enumerate(labels) if label in chosen]
    shown = {
        name: torch.nn.functional.normalize(features[name][rows], dim=1) for name in ("generation", "understanding")
    }
    write_tsne(path, shown, [labels[row] for row in rows], seed)
