"""Measure a model on the toy world.

example: hydra evaluate --out scores.json
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from .common import add_model, add_seed, check_out, load_pipeline


MOST = 1_000_000
NUMBERS = {  # option -> default, least, help
    "prompts_per_category": (100, 1, "of text to image"),
    "prompts_per_kind": (100, 0, "for each kind of phrasing; 0 leaves them out"),
    "prompts_per_size": (30, 0, "for each image size; 0 leaves them out"),
    "num_questions": (1000, 1, "about images, or about clips with --suite video"),
    "num_scenes": (256, 1, "to rebuild or to paint"),
    "num_captions": (200, 1, "of text to video"),
    "edits_per_kind": (100, 1, "of the five kinds of edits"),
}
SUITES = {  # what is measured with which numbers
    "toy": ("prompts_per_category", "prompts_per_kind", "prompts_per_size", "num_questions", "num_scenes"),
    "unimrg": ("prompts_per_category", "num_questions", "num_scenes"),
    "video": ("num_questions", "num_captions"),
    "edit": ("edits_per_kind",),
}


def add_options(command: argparse.ArgumentParser) -> None:
    add_model(command, "model", nargs="?")
    command.add_argument("--out", type=Path, required=True, help="JSON file for the scores")
    command.add_argument(
        "--suite", choices=tuple(SUITES), default="toy",
        help="toy: images; unimrg: painted maps, too; video: questions about clips, and text to video; edit: instructions",
    )  # fmt: skip
    for name, (default, _, text) in NUMBERS.items():
        command.add_argument(f"--{name}", type=int, default=default, help=text)
    command.add_argument("--difficulty", type=int, default=1, help="of the toy world: 1, 2 or 3")
    add_seed(command)


def run(options: argparse.Namespace) -> dict:
    for name, (_, least, _) in NUMBERS.items():
        if not least <= getattr(options, name) <= MOST:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least {least} and at most {MOST}.")
    if options.suite == "toy" and find_spec("skimage") is None:
        raise ValueError("The photographs of scikit-image are needed: pip install hydra_hf[eval].")
    check_out(options.out)
    pipeline = load_pipeline(options)
    from hydra_hf.files import write_text
    from hydra_hf.toy.language import ToyLanguage
    from hydra_hf.toy.world import ToyWorld

    measure = {"toy": _toy_scores, "unimrg": _unimrg_scores, "video": _video_scores, "edit": _edit_scores}[
        options.suite
    ]
    scores = measure(pipeline, ToyLanguage(ToyWorld(options.difficulty)), options)
    scores |= {name: getattr(options, name) for name in ("seed", "difficulty", *SUITES[options.suite])}
    print(json.dumps(scores, indent=2))  # first, because writing the file may fail
    write_text(options.out, json.dumps(scores, indent=2) + "\n")
    return scores


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


def _video_scores(pipeline, language, options: argparse.Namespace) -> dict:
    from hydra_hf.toy.clips import ToyClips
    from hydra_hf.toy.evaluation_x import evaluate_video_generation, evaluate_video_understanding

    clips, model, processor = ToyClips(language.world), pipeline.model, pipeline.processor
    if processor.video_token is None:
        raise ValueError(f"{options.model} only reads images, expected a model of HYDRA-X for --suite video.")
    scores = evaluate_video_understanding(model, processor, clips, options.num_questions, options.seed)
    return scores | evaluate_video_generation(pipeline, clips, options.num_captions, options.seed)


def _edit_scores(pipeline, language, options: argparse.Namespace) -> dict:
    from hydra_hf.toy.edits import ToyEdits
    from hydra_hf.toy.evaluation_x import evaluate_edits

    return evaluate_edits(pipeline, ToyEdits(language.world), options.edits_per_kind, options.seed)
