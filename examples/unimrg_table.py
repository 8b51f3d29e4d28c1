"""UniMRG against its baselines and its parts, from one base model, in the toy world.

python examples/unimrg_table.py --out runs/unimrg_table --seeds 0 1 2

Every run is `tiny.unimrg` with another mixture, each with 12 understanding samples in a step. Text to image, questions by type
and what is painted of held-out scenes are measured before and after. A run or a score that exists is not made again, so the
same command resumes a killed table. It writes `table.json`, `table.md`, `table.png` (with matplotlib), and `painted.png`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import load_file

from hydra_hf import HydraPipeline
from hydra_hf.files import write_image_grid, write_text
from hydra_hf.toy.evaluation import evaluate_unimrg, paint_scenes
from hydra_hf.toy.language import PAINTED, ToyLanguage
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.recipes import tiny
from hydra_hf.training.recipes.unimrg import MIXTURES


COLUMNS = (
    "t2i/mean", "vqa/mean", "vqa/spatial", "paint/psnr", "paint/depth_similarity", "paint/foreground_error", "paint/foreground_iou",
    "paint/order", "paint/boundary_f", "paint/white_share",
)  # fmt: skip
LORA = "_lora"  # behind the name of a mixture: adapters are trained instead of the weights
NAMES = [*MIXTURES, *(f"{mixture}{LORA}" for mixture in MIXTURES)]
ADAPTED = ("model.language_model", "model.vision_tower.sem_vit", "vision_head")  # the head is a fifth of the toy model


def measure(folder: str | Path, options: argparse.Namespace) -> dict[str, float]:
    """All scores of a saved pipeline, seed 0, difficulty 1, as `hydra evaluate --suite unimrg` gives them."""
    pipeline = HydraPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    numbers = options.num_prompts, options.num_questions, options.num_scenes
    return evaluate_unimrg(pipeline, ToyLanguage(ToyWorld(difficulty=1)), *numbers)


def run_one(options: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """The scores of one mixture from one seed; `base` is trained no further."""
    path = options.out / f"{name}-{seed}.json"
    if not path.exists():
        folder = options.init
        if name != "base":
            recipe = replace(tiny.unimrg(options.init, name.removesuffix(LORA)), seed=seed)
            overrides = {"num_steps": options.num_steps} if options.num_steps else {}
            if name.endswith(LORA):
                overrides |= {"lora_rank": options.lora_rank, "lora_targets": ADAPTED}
            folder = train_hydra(recipe.with_overrides(**overrides), options.out / f"{name}-{seed}", on_stage=print)
        scores = measure(folder, options)
        if name.endswith(LORA):
            adapter = (
                options.out
                / f"{name}-{seed}"
                / recipe.stages[-1].name
                / "final"
                / "adapter"
                / "adapter_model.safetensors"
            )
            scores["adapter_share"] = num_values(adapter) / num_values(folder / "model" / "model.safetensors")
        write_text(path, json.dumps(scores, indent=2) + "\n")
    return json.loads(path.read_text())


def write_picture(folder: Path, path: Path, num_scenes: int = 12) -> None:
    """Held-out images, depth maps and boundaries: a row of the truth above each row of what is painted."""
    pipeline, world = HydraPipeline.from_pretrained(folder), ToyWorld(difficulty=1)
    generator = torch.Generator().manual_seed(0)
    scenes = world.sample_scenes(num_scenes, generator, split="test", scattered=0.5)
    painted = paint_scenes(pipeline.model, pipeline.processor, world, scenes, generator)
    rows = [row for task, painter in PAINTED.items() for row in (getattr(world, painter)(scenes), painted[task])]
    write_image_grid(path, torch.cat(rows), num_columns=num_scenes)


def num_values(path: Path) -> int:
    """The number of values in all tensors of a file."""
    return sum(tensor.numel() for tensor in load_file(path).values())


def table_of(rows: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: mean and standard deviation over seeds."""
    lines = ["| | seeds | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, scores in rows.items():
        cells = []
        for column in COLUMNS:
            values = [score[column] for score in scores]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib import pyplot  # pip install matplotlib

    figure, axes = pyplot.subplots(1, len(COLUMNS), figsize=(3 * len(COLUMNS), 3), sharey=False)
    for axis, column in zip(axes, COLUMNS):
        for place, scores in enumerate(rows.values()):
            axis.scatter([place] * len(scores), [score[column] for score in scores])
        axis.set_xticks(range(len(rows)), list(rows), rotation=90)
        axis.set_title(column)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", default="runs/tiny.hydra/final", help="the base model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mixtures", nargs="+", default=[*MIXTURES, f"unimrg{LORA}"], choices=NAMES)
    parser.add_argument("--num_steps", type=int, help="instead of the recipe's")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--num_prompts", type=int, default=100, help="of each of six categories")
    parser.add_argument("--num_questions", type=int, default=1000)
    parser.add_argument("--num_scenes", type=int, default=128)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = {"base": [run_one(options, "base", 0)]}
    for seed in options.seeds:
        for name in options.mixtures:
            rows.setdefault(name, []).append(run_one(options, name, seed))
            print(table_of(rows), flush=True)
    write_text(options.out / "table.json", json.dumps(rows, indent=2) + "\n")
    write_text(options.out / "table.md", table_of(rows) + "\n")
    plot(rows, options.out / "table.png")
    if "unimrg" in options.mixtures:
        write_picture(options.out / f"unimrg-{options.seeds[0]}" / "final", options.out / "painted.png")


if __name__ == "__main__":
    main()
