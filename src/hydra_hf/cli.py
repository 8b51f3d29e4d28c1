"""hydra generate | ask | reconstruct | train | evaluate."""

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; a wrong argument or file is one line on stderr and exit code 2."""
    options = create_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"hydra {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def create_parser() -> argparse.ArgumentParser:
    from hydra_hf import TINY, __version__

    parser = argparse.ArgumentParser(prog="hydra", description="HYDRA: one model that sees, answers and draws.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _add(commands, generate, "draw a prompt", 'hydra generate "a cat" --out cat.png --seed 1')
    command.add_argument("prompt")
    command.add_argument("--out", type=Path, required=True, help="the picture's file; its ending names the format")
    command.add_argument("--negative_prompt", help="what to stay away from; the empty prompt by default")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--num_inference_steps", type=int, help="denoising steps; the model's own number by default")
    command.add_argument("--guidance_scale", type=float, help="1 is off; the model's own by default")
    command.add_argument("--height", type=int, help="pixels, a multiple of the patch size")
    command.add_argument("--width", type=int, help="pixels, a multiple of the patch size")
    _add_model(command, TINY)

    command = _add(commands, ask, "ask about a picture", 'hydra ask cat.png "what is in the picture?"')
    command.add_argument("image", type=Path)
    command.add_argument("question")
    _add_model(command, TINY)

    command = _add(commands, reconstruct, "encode and decode a picture", "hydra reconstruct cat.png --out again.png")
    command.add_argument("image", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--num_inference_steps", type=int, help="steps of a flow decoder; the model's own by default")
    command.add_argument("--seed", type=int, default=0)
    _add_model(command, TINY)

    command = _add(
        commands, train, "train a recipe, or go on with it", "hydra train tiny.tokenizer --out runs/tiny.tokenizer"
    )
    command.add_argument("recipe", help="module.function in hydra_hf.training.recipes, such as tiny.hydra")
    command.add_argument(
        "--out", type=Path, help="folder of the run; runs/RECIPE by default. An unfinished one goes on"
    )
    command.add_argument("--tokenizer", help="trained HYDRA-TOK, for recipes of HYDRA")
    command.add_argument("--num_steps", type=int, help="of every stage, instead of the recipe's")

    command = _add(commands, evaluate, "measure a model on the toy world", "hydra evaluate --out scores.json")
    command.add_argument("model", nargs="?", default=TINY, help="folder or Hub id; the embedded checkpoint by default")
    command.add_argument("--out", type=Path, required=True, help="JSON file of the scores")
    command.add_argument("--prompts_per_category", type=int, default=100)
    command.add_argument("--num_questions", type=int, default=1000)
    command.add_argument("--num_scenes", type=int, default=256)
    command.add_argument("--difficulty", type=int, default=1, help="of the toy world: 1, 2 or 3")
    command.add_argument("--seed", type=int, default=0)
    return parser


def _add(commands, run, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(run.__name__, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
                                  epilog=f"example: {example}")  # fmt: skip
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("--model", default=default, help="folder or Hub id; the embedded checkpoint by default")


def generate(options: argparse.Namespace) -> None:
    import torch

    _check_ending(options.out)
    image = _load(options.model)(
        options.prompt,
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    _save(image, options.out)
    print(f"{options.out}: {image.width}x{image.height}")


def ask(options: argparse.Namespace) -> None:
    from hydra_hf.evaluation.understanding import answer

    image = _open(options.image)
    pipeline = _load(options.model)
    print(answer(pipeline.model, pipeline.processor, [image], [options.question])[0])


def reconstruct(options: argparse.Namespace) -> None:
    import torch

    from hydra_hf import HydraReconstructionPipeline
    from hydra_hf.evaluation.metrics import psnr

    _check_ending(options.out)
    original = _open(options.image)
    pipeline = _load(options.model)
    image_processor = pipeline.processor.image_processor
    image = HydraReconstructionPipeline(
        vision_tower=pipeline.model.model.vision_tower, image_processor=image_processor
    )(
        original,
        num_inference_steps=options.num_inference_steps,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    _save(image, options.out)
    pair = [image_processor(picture, return_tensors="pt").pixel_values for picture in (original, image)]
    print(f"PSNR {psnr(*pair).item():.2f} dB at {image.width}x{image.height}")


def train(options: argparse.Namespace) -> None:
    from importlib import import_module
    from inspect import signature

    from hydra_hf.training.recipe import HydraRecipe, Recipe

    module_name, _, function_name = options.recipe.partition(".")
    try:
        make = getattr(import_module(f"hydra_hf.training.recipes.{module_name}"), function_name)
        made = signature(make)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"There is no recipe {options.recipe!r}; see hydra_hf.training.recipes.") from error
    if made.return_annotation not in (Recipe, HydraRecipe):
        raise ValueError(f"{options.recipe!r} is not a function that gives a recipe; see hydra_hf.training.recipes.")
    if options.tokenizer and "tokenizer" not in made.parameters:
        raise ValueError(f"The recipe {options.recipe} takes no --tokenizer, it trains one.")
    recipe = make(options.tokenizer) if options.tokenizer else make()
    if options.num_steps is not None:
        recipe = recipe.with_overrides(num_steps=options.num_steps)
    output_dir = options.out or Path("runs") / recipe.name
    if isinstance(recipe, HydraRecipe):
        from hydra_hf.training.hydra_trainer import train_hydra as run
    else:
        from hydra_hf.training.tokenizer_trainer import train_tokenizer as run
    print(run(recipe, output_dir, on_stage=print))


def evaluate(options: argparse.Namespace) -> None:
    from hydra_hf.data.toy_language import ToyLanguage
    from hydra_hf.data.toy_world import ToyWorld
    from hydra_hf.evaluation.generation import evaluate_generation
    from hydra_hf.evaluation.reconstruction import evaluate_reconstruction
    from hydra_hf.evaluation.understanding import evaluate_understanding
    from hydra_hf.training.checkpoints import write_text

    for name in ("prompts_per_category", "num_questions", "num_scenes"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1.")
    options.out.parent.mkdir(parents=True, exist_ok=True)  # before the long part
    pipeline = _load(options.model)
    pipeline.set_progress_bar_config(disable=True)
    language, seed = ToyLanguage(ToyWorld(options.difficulty)), options.seed
    scores = {
        **evaluate_generation(pipeline, language, options.prompts_per_category, seed),
        **evaluate_understanding(pipeline.model, pipeline.processor, language, options.num_questions, seed),
        **evaluate_reconstruction(pipeline.model.model.vision_tower, language, options.num_scenes, seed),
        "seed": seed,
        "difficulty": options.difficulty,
        "prompts_per_category": options.prompts_per_category,
        "num_questions": options.num_questions,
        "num_scenes": options.num_scenes,
    }
    write_text(options.out, json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


def _load(model: str):
    """The pipeline in a folder or on the Hub, without bars; ValueError says what is wrong with it."""
    import diffusers
    import transformers
    from safetensors import SafetensorError

    from hydra_hf import HydraPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        return HydraPipeline.from_pretrained(model)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: weights that do not fit their config
        raise ValueError(f"The model {model} cannot be loaded: {error}") from error


def _open(path: Path):
    """A picture; OSError or ValueError says what is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError) and error.errno is not None:
            raise  # the file system, not the picture
        raise ValueError(f"{path} is not a picture that can be read: {error}") from error
    return image


def _check_ending(path: Path) -> None:
    """Before the long part. Raises ValueError for a format that Pillow does not write."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} cannot be written: {path.suffix!r} is no format of pictures, expected .png or .jpg.")


def _save(image, path: Path) -> None:
    """Written beside its place and renamed, so that a killed run leaves no half picture."""
    import os

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    image.save(temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
