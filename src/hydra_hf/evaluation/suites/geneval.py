"""GenEval (Ghosh et al., 2023): 553 prompts of six categories, four images each.

The images are written in the official layout, which the official scorer reads. `--official_results` reads what that scorer
wrote. `--detector` scores here, by the published rules, with Mask2Former and CLIP of transformers: other weights and other
pre-processing than the official ones, so these scores are not comparable with published ones.
"""

import json
from collections import defaultdict
from pathlib import Path

from hydra_hf.files import write_text
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from ..report import SuiteResult
from .drawing import Drawing, draw, file_digest, limited


CATEGORIES = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
SCORER = "official code: evaluation/evaluate_images.py FOLDER --outfile results.jsonl; then --official_results results.jsonl"


def run(
    pipeline: HydraPipeline, model: str, *, data: Path, folder: Path, limit: int | None = None, num_images: int = 4,
    seed: int = 0, batch_size: int = 16, num_inference_steps: int | None = None, guidance_scale: float | None = None,
    height: int | None = None, width: int | None = None, detector: str | None = None,
    clip: str = "openai/clip-vit-large-patch14", official_results: Path | None = None,
) -> SuiteResult:  # fmt: skip
    """Draws the prompts of `data`, evaluation_metadata.jsonl, and scores them if there is a scorer."""
    prompts = limited(read_prompts(data), limit)
    for index, row in enumerate(prompts):
        metadata = folder / f"{index:05}" / "metadata.jsonl"
        if not metadata.is_file():
            write_text(metadata, json.dumps(row) + "\n")
    drawings = [
        Drawing(image_file(index, sample), row["prompt"], (index, sample))
        for index, row in enumerate(prompts)
        for sample in range(num_images)
    ]
    size = {"height": height, "width": width}
    steps = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    settings = draw(pipeline, model, drawings, folder, seed=seed, batch_size=batch_size, **size, **steps)
    scores, scorer, notes = {}, "none", [f"Images in {folder}; {SCORER.replace('FOLDER', str(folder))}."]
    if official_results is not None:
        scores, scorer, notes = mean_scores(read_official(official_results, len(drawings))), "official", []
    elif detector is not None:
        from .detection import ColorClassifier, Detector

        judge = Judge(Detector(detector, pipeline.device), ColorClassifier(clip, pipeline.device))
        verdicts = [
            (row["tag"], judge.is_right(folder / image_file(index, sample), row))
            for index, row in enumerate(prompts)
            for sample in range(num_images)
        ]
        scores, scorer = mean_scores(verdicts), f"own: {detector}, {clip}"
        notes = ["Scored by transformers' Mask2Former and CLIP, not by the official scorer: not comparable.", *notes]
    is_whole = [row["tag"] for row in prompts] == [tag for tag, count in CATEGORIES.items() for _ in range(count)]
    if not is_whole:
        notes.append(f"{len(prompts)} prompts, not the 553 of GenEval.")
    is_raw = all(row["prompt"].startswith("a photo of") for row in prompts)
    protocol = {**settings, "data": file_digest(data), "prompts": "raw" if is_raw else "rewritten", "scorer": scorer}
    return SuiteResult(
        "geneval", model, {f"geneval/{name}": value for name, value in scores.items()},
        {**protocol, "images for each prompt": num_images}, {"seed": seed},
        {"prompts": len(prompts), "images": len(drawings)}, is_comparable=scorer == "official" and is_whole, notes=notes,
    )  # fmt: skip


def image_file(index: int, sample: int) -> str:
    return f"{index:05}/samples/{sample:04}.png"


def read_prompts(path: Path) -> list[dict]:
    """Rows of evaluation_metadata.jsonl. Raises ValueError for a line that is not one of GenEval's."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            known = row["tag"] in CATEGORIES and isinstance(row["prompt"], str)
            for clause in (*row["include"], *row.get("exclude", [])):
                known &= isinstance(clause["class"], str) and isinstance(clause["count"], int)
                known &= clause.get("color", COLORS[0]) in COLORS
                known &= clause.get("position", RELATIONS)[0] in RELATIONS
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a row of GenEval: {line:.100}") from error
        if not known:
            raise ValueError(f"{path}, line {number} has an unknown tag, colour or relation: {line:.100}")
        rows.append(row)
    return rows


def read_official(path: Path, num_images: int) -> list[tuple[str, bool]]:
    """(category, verdict) of each image in results.jsonl of the official scorer. Raises ValueError for another number of images."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(rows) != num_images:
        raise ValueError(f"{path} judges {len(rows)} images, expected the {num_images} that were drawn.")
    return [(row["tag"], bool(row["correct"])) for row in rows]


def mean_scores(verdicts: list[tuple[str, bool]]) -> dict[str, float]:
    """Share of right images by category, and `overall`, the mean of the categories that occur."""
    by_category = defaultdict(list)
    for category, is_right in verdicts:
        by_category[category].append(is_right)
    scores = {name: sum(by_category[name]) / len(by_category[name]) for name in CATEGORIES if name in by_category}
    return {**scores, "overall": sum(scores.values()) / len(scores)}


class Judge:
    """GenEval's rules. Every `include` clause must hold, no `exclude` clause may."""

    max_objects = 16  # of a class
    thresholds = {"counting": 0.9}  # of confidence; 0.3 for the other categories
    threshold = 0.3

    def __init__(self, detector, color_classifier):
        self.detector, self.color_classifier = detector, color_classifier

    def is_right(self, path: Path, row: dict) -> bool:
        from PIL import Image

        image = Image.open(path).convert("RGB")
        objects = self.detector(image, self.thresholds.get(row["tag"], self.threshold))
        found = {name: given[: self.max_objects] for name, given in objects.items()}
        return self.agrees(image, found, row)

    def agrees(self, image, objects: dict[str, list], row: dict) -> bool:
        """Whether objects by class, the surest first, are what the row asks for."""
        matched = []
        for clause in row["include"]:
            group = objects.get(clause["class"], [])[: clause["count"]]
            if len(group) < clause["count"]:
                return False
            if "color" in clause:
                colors = self.color_classifier(image, group, clause["class"])
                if colors.count(clause["color"]) < clause["count"]:
                    return False
            if "position" in clause:
                relation, target = clause["position"]
                pairs = [(thing, other) for thing in group for other in matched[target]]
                if any(relation not in relations_of(thing.box, other.box) for thing, other in pairs):
                    return False
            matched.append(group)
        return not any(len(objects.get(clause["class"], [])) >= clause["count"] for clause in row.get("exclude", []))


def relations_of(box: tuple[float, ...], other: tuple[float, ...], slack: float = 0.1) -> set[str]:
    """Where a box (left, top, right, bottom) is, seen from another one.

    The offset of the centres is shortened by `slack` of both sizes, and each direction must be over half of the distance.
    """
    offsets, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (box[low] + box[high] - other[low] - other[high]) / 2
        sizes = abs(box[high] - box[low]) + abs(other[high] - other[low])
        offsets.append(offset)
        shortened.append(max(abs(offset) - slack * sizes, 0) * (1 if offset > 0 else -1))
    distance = (offsets[0] ** 2 + offsets[1] ** 2) ** 0.5
    if max(map(abs, shortened)) < 1e-3:
        return set()
    right, down = (value / distance for value in shortened)
    directions = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {name for name, value in directions.items() if value > 0.5}
