"""Measure a model on the toy world.

example: hydra evaluate --out scores.json
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from .common import add_model, add_seed, check_out, load_pipeline


MOST = 1_000_000


def add_options(command: argparse.ArgumentParser) -> None:
    add_model(command, "model", nargs="?")
    command.add_argument("--out", type=Path, required=True, help="JSON file for the scores")
    command.add_argument("--suite", choices=("toy", "unimrg"), default="toy", help="unimrg also measures painted maps")
    command.add_argument("--prompts_per_category", type=int, default=100)
    command.add_argument(
        "--prompts_per_kind", type=int, default=100, help="for each kind of phrasing; 0 leaves them out"
    )
    command.add_argument("--prompts_per_size", type=int, default=30, help="for each image size; 0 leaves them out")
    command.add_argument("--num_questions", type=int, default=1000)
    command.add_argument("--num_scenes", type=int, default=256)
    command.add_argument("--difficulty", type=int, default=1, help="of the toy world: 1, 2 or 3")
    add_seed(command)


def run(options: argparse.Namespace) -> None:
    least = {
        "prompts_per_category": 1,
        "prompts_per_kind": 0,
        "prompts_per_size": 0,
        "num_questions": 1,
        "num_scenes": 1,
    }
    for name, number in least.items():
        if not number <= getattr(options, name) <= MOST:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least {number} and at most {MOST}.")
    if options.suite == "toy" and find_spec("skimage") is None:
        raise ValueError("The photographs of scikit-image are needed: pip install hydra_hf[eval].")
    check_out(options.out)
    from hydra_hf.files import write_text
    from hydra_hf.toy.language import ToyLanguage
    from hydra_hf.toy.world import ToyWorld

    pipeline = load_pipeline(options)
    pipeline.set_progress_bar_config(disable=True)
    measure = _toy_scores if options.suite == "toy" else _unimrg_scores
    scores = measure(pipeline, ToyLanguage(ToyWorld(options.difficulty)), options)
    unused = () if options.suite == "toy" else ("prompts_per_kind", "prompts_per_size")
    scores |= {name: getattr(options, name) for name in ("seed", "difficulty", *least) if name not in unused}
    print(json.dumps(scores, indent=2))  # first, because writing the file may fail
    write_text(options.out, json.dumps(scores, indent=2) + "\n")


def _toy_scores(pipeline, language, options: argparse.Namespace) -> dict:
    from hydra_hf.toy import evaluation

    model, processor, seed = pipeline.model, pipeline.processor, options.seed
    scores = evaluation.evaluate_generation(pipeline, language, options.prompts_per_category, seed)
    if options.prompts_per_kind:
        scores |= evaluation.evaluate_phrasing(pipeline, language, options.prompts_per_kind, seed)
    if options.prompts_per_size:
        scores |= evaluation.evaluate_sizes(pipeline, language, options.prompts_per_size, seed)
    scores |= evaluation.evaluate_understanding(model, processor, language, options.num_questions, seed)
    return scores | evaluation.evaluate_reconstruction(model.model.vision_tower, language, options.num_scenes, seed)


def _unimrg_scores(pipeline, language, options: argparse.Namespace) -> dict:
    from hydra_hf.toy.evaluation import evaluate_unimrg

    numbers = options.prompts_per_category, options.num_questions, options.num_scenes
    return evaluate_unimrg(pipeline, language, *numbers, options.seed)
