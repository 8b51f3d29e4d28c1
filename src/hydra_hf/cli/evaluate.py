"""Measure a model on the toy world or on a benchmark.

example: hydra evaluate --out scores.json
"""

import argparse
import inspect
import json
from importlib.util import find_spec
from pathlib import Path

from .common import add_model, add_seed, check_out, load_pipeline, load_vision_tower


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
BENCHMARK_OPTIONS = {  # of suites of hydra_hf.evaluation.suites: name -> type, help
    "data": (Path, "the benchmark's prompts or edits, as it distributes them, or a folder of images or clips"),
    "targets": (Path, "of --suite painting: the folder that hydra prepare unimrg made of the images in --data"),
    "folder": (Path, "for images, clips and answers; a killed run is resumed from it"),
    "tasks": (str, "of lmms-eval or VLMEvalKit, with commas"),
    "limit": (int, "only the first rows of a benchmark"),
    "batch_size": (int, "images or questions at once"),
    "num_images": (int, "for each prompt; the benchmark's own number by default"),
    "num_inference_steps": (int, "denoising steps; the model's own number by default"),
    "guidance_scale": (float, "the model's own by default"),
    "image_guidance_scale": (float, "of edits; the model's own by default"),
    "height": (int, "pixels"),
    "width": (int, "pixels"),
    "num_frames": (int, "of clips, 1 + 4n"),
    "fps": (float, "frames a second of clips"),
    "image_root": (Path, "of the images that --data names"),
    "detector": (str, "of GenEval's own scorer: a Mask2Former, such as facebook/mask2former-swin-small-coco-instance"),
    "clip": (str, "of GenEval's own scorer: CLIP, openai/clip-vit-large-patch14 by default"),
    "official_results": (Path, "results.jsonl of GenEval's official scorer"),
    "include_path": (Path, "a folder with tasks of lmms-eval of your own"),
    "mode": (str, "of lmms-eval: understanding or generation"),
    "judge": (str, "of VLMEvalKit: exact_matching by default, or a model behind an API"),
    "max_new_tokens": (int, "of an answer under VLMEvalKit"),
    "size": (int, "pixels of the square crops that are rebuilt or seen; 256, or the model's own for features"),
    "model_size": (int, "pixels that the model sees, if its patches do not divide --size"),
    "backbone": (
        str,
        "of the Frechet distance: inception (rFID) or timm:NAME; a video model of transformers for clips",
    ),
    "backbone_weights": (str, "safetensors of timm:NAME"),
    "perceptual_backbone": (str, "lpips:alex, lpips:vgg, lpips:squeeze or timm:NAME"),
    "perceptual_weights": (str, "safetensors of its trunk"),
    "teacher": (str, "whose layers features are compared with: a folder or Hub id"),
    "num_neighbors": (int, "k of CKNNA, 10 by default"),
    "num_classes": (int, "in the t-SNE map, 10 by default"),
}


def add_options(command: argparse.ArgumentParser) -> None:
    add_model(command, "model", nargs="?")
    command.add_argument(
        "--out", type=Path, required=True, help="JSON file for the result, which `hydra report` reads"
    )
    from hydra_hf.evaluation import suites

    benchmarks = "; ".join(f"{name}: {text}" for name, (_, text) in suites.SUITES.items())
    command.add_argument(
        "--suite", choices=(*SUITES, *suites.SUITES), default="toy", metavar="NAME",
        help="toy: images; unimrg: painted maps, too; video: questions about clips, and text to video; edit: instructions;"
        f" or a benchmark. {benchmarks}",
    )  # fmt: skip
    for name, (default, _, text) in NUMBERS.items():
        command.add_argument(f"--{name}", type=int, default=default, help=text)
    command.add_argument("--difficulty", type=int, default=1, help="of the toy world: 1, 2 or 3")
    add_seed(command)
    group = command.add_argument_group("benchmarks")
    for name, (kind, text) in BENCHMARK_OPTIONS.items():
        group.add_argument(f"--{name}", type=kind, help=text)


def run(options: argparse.Namespace) -> dict:
    for name, (_, least, _) in NUMBERS.items():
        if not least <= getattr(options, name) <= MOST:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least {least} and at most {MOST}.")
    if options.suite not in SUITES:
        return run_benchmark(options)
    if given := [name for name in BENCHMARK_OPTIONS if getattr(options, name) is not None]:
        raise ValueError(f"--{given[0]} does not go with --suite {options.suite}.")
    if options.suite == "toy" and find_spec("skimage") is None:
        raise ValueError("The photographs of scikit-image are needed: pip install hydra_hf[eval].")
    check_out(options.out)
    pipeline = load_pipeline(options)
    from hydra_hf.toy.language import ToyLanguage
    from hydra_hf.toy.world import ToyWorld

    measure = {"toy": _toy_scores, "unimrg": _unimrg_scores, "video": _video_scores, "edit": _edit_scores}[
        options.suite
    ]
    scores = measure(pipeline, ToyLanguage(ToyWorld(options.difficulty)), options)
    settings = {name: getattr(options, name) for name in ("seed", "difficulty", *SUITES[options.suite])}
    print(json.dumps(scores | settings, indent=2))  # first, because writing the file may fail
    result = toy_result(pipeline, options, scores)
    result.save(options.out)
    return result.content()


def toy_result(pipeline, options: argparse.Namespace, scores: dict[str, float]):
    """The scores of a suite of the toy world as a `SuiteResult`."""
    from hydra_hf.evaluation.report import TOY_WORLD, SuiteResult
    from hydra_hf.evaluation.suites.drawing import describe

    protocol = {
        "data": TOY_WORLD, "difficulty": options.difficulty, "split": "test",
        "scorer": "exact answers; a checker without learned weights for what is drawn", **describe(pipeline, options.model),
    }  # fmt: skip
    return SuiteResult(
        options.suite, options.model, scores, protocol, {"seed": options.seed},
        {name: getattr(options, name) for name in SUITES[options.suite]}, notes=["No paper has scores of the toy world."],
    )  # fmt: skip


def run_benchmark(options: argparse.Namespace) -> dict:
    from hydra_hf.evaluation.suites import load_suite

    run_suite = load_suite(options.suite)
    arguments = benchmark_arguments(options, run_suite)
    check_out(options.out)
    if "vision_tower" in inspect.signature(run_suite).parameters:
        measured = load_vision_tower(options)
    else:
        measured = load_pipeline(options)
        measured.set_progress_bar_config(disable=True)
    try:
        result = run_suite(measured, options.model, **arguments)
    except ImportError as error:  # names the extra
        raise ValueError(str(error)) from error
    print(result.markdown())  # first, because writing the file may fail
    for note in result.notes:
        print(note)
    result.save(options.out)
    return result.content()


def benchmark_arguments(options: argparse.Namespace, run_suite) -> dict:
    """The options that are the suite's. Raises ValueError for one that it does not have, and one that it lacks."""
    parameters = inspect.signature(run_suite).parameters
    given = {name: getattr(options, name) for name in BENCHMARK_OPTIONS if getattr(options, name) is not None}
    if unknown := [name for name in given if name not in parameters]:
        raise ValueError(f"--{unknown[0]} does not go with --suite {options.suite}.")
    needed = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    if missing := [name for name in BENCHMARK_OPTIONS if name in needed and name not in given]:
        raise ValueError(f"--suite {options.suite} needs --{missing[0]}, {BENCHMARK_OPTIONS[missing[0]][1]}.")
    if (least := min((given[name] for name in ("limit", "batch_size", "num_images") if name in given), default=1)) < 1:
        raise ValueError(f"Got {least}, expected at least 1 of --limit, --batch_size and --num_images.")
    for name in ("data", "targets", "image_root", "official_results", "include_path"):
        if name in given and not given[name].exists():
            raise ValueError(f"--{name} {given[name]} does not exist.")
    return {**given, "seed": options.seed}


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
