"""The claims of HYDRA-X at toy scale: trains what they compare, measures it, and prints and plots tables.

python examples/hydra_x_table.py --out runs/hydra_x_table --seeds 0 1

A run or a score that exists is not made again, so the same command resumes a killed table. It writes `table.json`, `table.md` and
`table.png` (with matplotlib). A group of claims is an entry of `PARTS`: its rows, its columns, and the function that trains and
measures one row from one seed.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from hydra_hf import HydraPipeline, HydraTokConfig, HydraTokModel
from hydra_hf.evaluation.metrics import psnr
from hydra_hf.evaluation.reconstruction import reconstruct, score_reconstructions
from hydra_hf.files import write_text
from hydra_hf.toy.clips import CLIP_QUESTION_TYPES, ToyClips, render_clips
from hydra_hf.toy.edits import ToyEdits, source_scenes
from hydra_hf.toy.evaluation_x import evaluate_edits, evaluate_video_understanding
from hydra_hf.toy.world import ToyWorld, color_fields
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.losses import frames_of
from hydra_hf.training.recipe import HydraLossWeights, HydraRecipe, Recipe
from hydra_hf.training.recipes import tiny_x
from hydra_hf.training.vision_tower_trainer import train_tokenizer


Scores = dict[str, float]


@dataclass(frozen=True)
class Part:
    """A table.

    Args:
        rows: what is compared.
        columns: the scores that are shown.
        run: the scores of one row from one seed.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    run: Callable[[argparse.Namespace, str, int], Scores]


# The tokenizer: who sees whom, with the folds of Gen-ViT and the unfolds of the decoder (HYDRA-X, table 1)

TOKENIZERS = {
    "full": ("full", [0, 0], [3, 3]),
    "causal": ("causal", [0, 0], [3, 3]),
    "tubelet": ("tubelet", [0, 0], [3, 3]),
    "tubelet_two_folds": ("tubelet", [0, 2], [1, 3]),
}
RATES = {
    "model.gen_vit": 1e-4,
    "model.bottleneck": 1e-4,
    "model.pixel_decoder": 1e-3,
}  # a trained encoder and a new decoder


def tokenizer_recipe(options: argparse.Namespace, name: str, seed: int) -> Recipe:
    """`tiny_x.tokenizer` with other attention and folds; the whole encoder is trained, from that of `--init`."""
    attention, folds, unfolds = TOKENIZERS[name]
    recipe = tiny_x.tokenizer(f"{options.init}/model")
    config = {**recipe.config.to_dict(), "temporal_attention": attention, "temporal_fold_layers": folds}
    stage = recipe.stages[0]  # of clips and the decoder; the next ones are about Sem-ViT
    decoder_config = stage.decoder_config.to_dict() | {
        "temporal_attention": attention,
        "temporal_unfold_layers": unfolds,
    }
    stage = replace(
        stage, num_steps=options.num_steps, batch_size=16, keeps_image_latents=False, learning_rates=RATES,
        decoder_config=type(stage.decoder_config).from_dict(decoder_config),
    )  # fmt: skip
    return replace(recipe, config=HydraTokConfig.from_dict(config), stages=(stage,), seed=seed)


def score_tokenizer(model: HydraTokModel, options: argparse.Namespace) -> Scores:
    """Of held-out clips, frame by frame, and of held-out images."""
    world, generator = ToyWorld(difficulty=1), torch.Generator().manual_seed(0)
    clips = render_clips(world, ToyClips(world).sample(options.num_clips, generator, split="test", scattered=True))
    images = world.render(world.sample_scenes(options.num_images, generator, split="test"))

    def score(kind: str, originals: Tensor) -> Scores:
        copies = reconstruct(model, originals, batch_size=8)
        scores = score_reconstructions([(frames_of(originals), frames_of(copies))])
        return {f"{kind}/{name}": value for name, value in scores.items()}

    return score("clip", clips) | score("image", images)


def run_tokenizer(options: argparse.Namespace, name: str, seed: int) -> Scores:
    folder = train_tokenizer(
        tokenizer_recipe(options, name, seed), options.out / f"tokenizer-{name}-{seed}", on_stage=print
    )
    return score_tokenizer(HydraTokModel.from_pretrained(folder).eval(), options)


# Edits: whether Sem-ViT reads the target together with its source (HYDRA-X, section 3 and table 3); and the same on backgrounds that
# only the source tells, with the loss of pixels, without which they are hardly learnt

EDITING = {"interaction": True, "independent": False}
EDIT_SHIFT = 5.0  # of noise levels in training


def without_edits(name: str, options: argparse.Namespace) -> Path:
    """The model of images, which has never edited, with Sem-ViT as `name` says."""
    folder = options.out / f"start-{name}"
    if not folder.exists():
        shutil.copytree(options.init, folder)
        config = folder / "model" / "config.json"
        fields = json.loads(config.read_text()) | {"use_source_interaction": EDITING[name]}
        write_text(config, json.dumps(fields, indent=2) + "\n")
    return folder


def edit_recipe(options: argparse.Namespace, part: str, name: str, seed: int) -> HydraRecipe:
    """`tiny_x.hydra` with one stage, that of copies and edits, at noise levels that copies are decided at."""
    recipe = tiny_x.hydra(str(without_edits(name, options)), options.tokenizer)
    (copies,) = (stage for stage in recipe.stages if stage.name == "copies")
    stage = replace(copies, num_steps=options.num_edit_steps, sigma_shifts={"edit": EDIT_SHIFT})
    if part == "color_fields":
        data, weights = replace(stage.data, color_field_share=1.0), HydraLossWeights(pixels=1.0)
        stage = replace(stage, data=data, loss_weights=weights)
    return replace(recipe, stages=(stage,), seed=seed)


def run_edits(options: argparse.Namespace, name: str, seed: int, part: str = "edits") -> Scores:
    """As `hydra evaluate --suite edit` measures them, without guidance, which is another comparison."""
    recipe = edit_recipe(options, part, name, seed)
    pipeline = HydraPipeline.from_pretrained(
        train_hydra(recipe, options.out / f"{part}-{name}-{seed}", on_stage=print)
    )
    pipeline.set_progress_bar_config(disable=True)
    edits = ToyEdits(ToyWorld(difficulty=1))
    copies = {"copy_psnr": score_copies(pipeline, edits, part, options.num_edits)}
    return copies | evaluate_edits(pipeline, edits, options.num_edits, guidance_scale=1.0, image_guidance_scale=1.0)


def score_copies(pipeline: HydraPipeline, edits: ToyEdits, part: str, num_copies: int) -> float:
    """Mean PSNR in dB of held-out pictures that are drawn again through the editing path: without an instruction."""
    generator = torch.Generator().manual_seed(0)
    scenes = source_scenes(edits.sample(num_copies, generator, split="test"))
    fields = color_fields(num_copies, scenes.canvas, generator) if part == "color_fields" else None
    sources = edits.world.render(scenes, fields)
    pictures = pipeline.processor.image_processor.postprocess(sources, output_type="pil")
    settings = {"generator": generator, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "output_type": "pt"}
    copies = pipeline([""] * len(pictures), image=pictures, **settings).images.cpu() * 2 - 1
    return psnr(copies, sources).mean().item()


# Teachers: what Sem-ViT has learnt of clips before the language model asks about them (HYDRA-X, table 2)

QUESTIONS = tuple(f"video_vqa/{kind}" for kind in CLIP_QUESTION_TYPES)
TEACHERS = ("none", "image_teacher", "image_and_video_teacher")


def teacher_recipe(options: argparse.Namespace, name: str, seed: int) -> Recipe:
    """The stage "semantics" of `tiny_x.tokenizer` on a tokenizer that has not seen it."""
    recipe = tiny_x.tokenizer(options.tokenizer)
    stage = replace(recipe.stages[1], num_steps=options.num_teacher_steps)
    if name == "image_teacher":
        weights = replace(stage.loss_weights, video_distill=0.0)
        rates = {module: rate for module, rate in stage.learning_rates.items() if module != "decompressor"}
        stage = replace(stage, loss_weights=weights, learning_rates=rates, video_teacher=None, video_teacher_size=None)
    return replace(recipe, stages=(stage,), seed=seed)


def run_teacher(options: argparse.Namespace, name: str, seed: int) -> Scores:
    """Answers about held-out clips after equally many steps of questions about clips."""
    tokenizer = options.tokenizer
    if name != "none":
        recipe = teacher_recipe(options, name, seed)
        tokenizer = str(train_tokenizer(recipe, options.out / f"semantics-{name}-{seed}", on_stage=print))
    recipe = tiny_x.hydra(options.init, tokenizer)
    (everything,) = (stage for stage in recipe.stages if stage.name == "all")
    stage = replace(
        everything, name="questions", num_steps=options.num_question_steps, tasks={"video_understand": 12},
        task_weights={},
    )  # fmt: skip
    recipe = replace(recipe, stages=(stage,), seed=seed)
    folder = train_hydra(recipe, options.out / f"questions-{name}-{seed}", on_stage=print)
    pipeline, clips = HydraPipeline.from_pretrained(folder), ToyClips(ToyWorld(difficulty=1))
    return evaluate_video_understanding(pipeline.model, pipeline.processor, clips, options.num_questions)


PARTS = {
    "tokenizer": Part(tuple(TOKENIZERS), ("clip/psnr", "clip/ssim", "image/psnr", "image/ssim"), run_tokenizer),
    "edits": Part(tuple(EDITING), ("copy_psnr", "edit_psnr/mean", "edit/mean", "edit_decoded_psnr/mean"), run_edits),
    "color_fields": Part(tuple(EDITING), ("copy_psnr", "edit_psnr/mean"), partial(run_edits, part="color_fields")),
    "teachers": Part(TEACHERS, ("video_vqa/mean", "video_vqa/majority", *QUESTIONS), run_teacher),
}


# The tables


def scores_of(options: argparse.Namespace, part: str, name: str, seed: int) -> Scores:
    """Those of an earlier call, or new ones."""
    path = options.out / f"{part}-{name}-{seed}.json"
    if not path.exists():
        write_text(path, json.dumps(PARTS[part].run(options, name, seed), indent=2) + "\n")
    return json.loads(path.read_text())


def table_of(columns: tuple[str, ...], rows: dict[str, list[Scores]]) -> str:
    """A Markdown table: mean and standard deviation over seeds."""
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name, scores in rows.items():
        cells = []
        for column in columns:
            values = [score[column] for score in scores]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(tables: dict[str, dict[str, list[Scores]]], path: Path) -> None:
    """A row of diagrams for each table, one for each column, with a dot for each seed."""
    from matplotlib import pyplot  # pip install matplotlib

    width = max(len(PARTS[part].columns) for part in tables)
    figure, grid = pyplot.subplots(len(tables), width, figsize=(3 * width, 4 * len(tables)), squeeze=False)
    for (part, rows), axes in zip(tables.items(), grid):
        for axis in axes[len(PARTS[part].columns) :]:
            axis.axis("off")
        for axis, column in zip(axes, PARTS[part].columns):
            for place, scores in enumerate(rows.values()):
                axis.scatter([place] * len(scores), [score[column] for score in scores])
            axis.set_xticks(range(len(rows)), list(rows), rotation=90)
            axis.set_title(column)
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--num_steps", type=int, default=400, help="of each tokenizer")
    parser.add_argument("--num_clips", type=int, default=64)
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--init", default=tiny_x.IMAGES, help="the model of images that edits are learnt from")
    parser.add_argument("--tokenizer", default="runs/tiny_x.tokenizer/final", help="its tokenizer, for clips too")
    parser.add_argument("--num_edit_steps", type=int, default=400)
    parser.add_argument("--num_edits", type=int, default=50, help="of each kind")
    parser.add_argument("--num_teacher_steps", type=int, default=400)
    parser.add_argument("--num_question_steps", type=int, default=300)
    parser.add_argument("--num_questions", type=int, default=600)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {}
    for part in options.parts:
        tables[part] = rows = {}
        for seed in options.seeds:
            for name in PARTS[part].rows:
                rows.setdefault(name, []).append(scores_of(options, part, name, seed))
                print(table_of(PARTS[part].columns, rows), flush=True)
    write_text(options.out / "table.json", json.dumps(tables, indent=2) + "\n")
    texts = [f"## {part}\n\n{table_of(PARTS[part].columns, rows)}\n" for part, rows in tables.items()]
    write_text(options.out / "table.md", "\n".join(texts))
    plot(tables, options.out / "table.png")


if __name__ == "__main__":
    main()
