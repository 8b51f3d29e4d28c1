"""hydra generate | ask | reconstruct | train | evaluate | convert."""

import argparse
import json
import sys
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError


STAGE_OPTIONS = {
    "teacher_weights": "safetensors of a timm teacher",
    "perceptual_backbone": "lpips:vgg, lpips:alex, lpips:squeeze or timm:NAME",
    "perceptual_weights": "safetensors of its trunk",
    "frechet_backbone": "timm:NAME of a Frechet distance while training",
    "frechet_weights": "its safetensors",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; a wrong argument, file or config is one line on stderr and exit code 2."""
    options = create_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"hydra {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def create_parser() -> argparse.ArgumentParser:
    from hydra_hf import __version__

    parser = argparse.ArgumentParser(prog="hydra", description="HYDRA: one model that sees, answers and draws.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_options in (_add_generate, _add_ask, _add_reconstruct, _add_train, _add_evaluate, _add_convert):
        add_options(commands)
    return parser


def _add_generate(commands) -> None:
    command = _add(commands, generate, "draw a prompt", 'hydra generate "a cat" --out cat.png --seed 1')
    command.add_argument("prompt")
    command.add_argument("--out", type=Path, required=True, help="the picture's file; its ending names the format")
    command.add_argument("--negative_prompt", help="what to stay away from; the empty prompt by default")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--num_inference_steps", type=int, help="denoising steps; the model's own number by default")
    command.add_argument("--guidance_scale", type=float, help="1 is off; the model's own by default")
    command.add_argument("--height", type=int, help="pixels, a multiple of the patch size")
    command.add_argument("--width", type=int, help="pixels, a multiple of the patch size")
    _add_model(command, "--model")


def _add_ask(commands) -> None:
    command = _add(commands, ask, "ask about a picture", 'hydra ask cat.png "what is in the picture?"')
    command.add_argument("image", type=Path)
    command.add_argument("question")
    _add_model(command, "--model")


def _add_reconstruct(commands) -> None:
    command = _add(commands, reconstruct, "encode and decode a picture", "hydra reconstruct cat.png --out again.png")
    command.add_argument("image", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--num_inference_steps", type=int, help="steps of a flow decoder; the model's own by default")
    command.add_argument("--seed", type=int, default=0)
    _add_model(command, "--model")


def _add_train(commands) -> None:
    command = _add(
        commands, train, "train a recipe, or go on with it", "hydra train tiny.tokenizer --out runs/tiny.tokenizer"
    )
    command.add_argument("recipe", help="module.function in hydra_hf.training.recipes, such as tiny.hydra")
    command.add_argument(
        "--out", type=Path, help="folder of the run; runs/RECIPE by default. An unfinished one goes on"
    )
    command.add_argument("--tokenizer", help="trained HYDRA-TOK, for recipes of HYDRA")
    command.add_argument("--init", help="folder or Hub id to start from, such as `hydra convert` writes")
    command.add_argument(
        "--teacher", help="frozen ViT of the distillation: folder, Hub id or timm:NAME; --init by default"
    )
    command.add_argument("--decoder", help="size of the flow decoder: S, M or L")
    command.add_argument("--data", action="append", metavar="TASK=PATH", help="what is trained on; may be repeated")
    command.add_argument("--held_out", action="append", metavar="TASK=PATH", help="images to measure a tokenizer on")
    command.add_argument("--micro_batch_size", type=int, help="samples in memory at once; the rest is accumulated")
    command.add_argument("--gradient_checkpointing", action="store_true", default=None, help="less memory, more time")
    for name, summary in STAGE_OPTIONS.items():
        command.add_argument(f"--{name}", help=summary)
    command.add_argument("--num_steps", type=int, help="of every stage, instead of the recipe's")
    command.add_argument("--stage", help="of HYDRA: this one alone")
    command.add_argument("--lora_rank", type=int, help="of HYDRA: adapters on the language model and Sem-ViT")
    command.add_argument("--num_workers", type=int, help="of HYDRA: processes that read ahead")
    command.add_argument("--dry_run", action="store_true", default=None, help="of HYDRA: what a step sees and costs")


def _add_evaluate(commands) -> None:
    command = _add(commands, evaluate, "measure a model on the toy world", "hydra evaluate --out scores.json")
    _add_model(command, "model", nargs="?")
    command.add_argument("--out", type=Path, required=True, help="JSON file of the scores")
    command.add_argument("--prompts_per_category", type=int, default=100)
    command.add_argument("--num_questions", type=int, default=1000)
    command.add_argument("--num_scenes", type=int, default=256)
    command.add_argument("--difficulty", type=int, default=1, help="of the toy world: 1, 2 or 3")
    command.add_argument("--seed", type=int, default=0)


def _add_convert(commands) -> None:
    command = _add(
        commands, convert, "make first weights from public checkpoints",
        "hydra convert --vision OpenGVLab/InternViT-300M-448px-V2_5 --language Qwen/Qwen2.5-1.5B-Instruct --out hydra-init",
    )  # fmt: skip
    command.add_argument("--vision", required=True, help="InternViT, InternVL or SigLIP2: folder or Hub id")
    command.add_argument("--language", help="Qwen2.5, Qwen3 or Llama: folder or Hub id; none makes a tokenizer alone")
    command.add_argument("--out", type=Path, required=True, help="the new folder")
    command.add_argument(
        "--decoder", help="size of the flow decoder: S, M or L; S on InternViT, on SigLIP2 a ViT decoder"
    )
    command.add_argument(
        "--num_gen_layers", type=int, help="the ViT's layers in front of the bottleneck; half by default"
    )
    command.add_argument("--dtype", help="such as bfloat16; what holds all weights of the sources by default")
    command.add_argument("--shard_size", default="5GB", help="of a file; as much is in memory at a time")
    command.add_argument("--seed", type=int, default=0, help="of the weights that no source has")
    command.add_argument("--revision", help="of the vision model on the Hub")
    command.add_argument("--language_revision", help="of the language model on the Hub")


def _add(commands, run, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(run.__name__, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
                                  epilog=f"example: {example}")  # fmt: skip
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser, name: str, **kwargs) -> None:
    from hydra_hf import TINY

    command.add_argument(name, default=TINY, help="folder or Hub id; the embedded checkpoint by default", **kwargs)


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
    recipe = _override(make(**_given(options, made.parameters)), options)
    output_dir = options.out or Path("runs") / recipe.name
    if isinstance(recipe, HydraRecipe):
        _train_hydra(recipe, output_dir, options)
        return
    if given := [name for name in ("stage", "num_workers", "dry_run") if getattr(options, name) is not None]:
        raise ValueError(f"The recipe {options.recipe} takes no --{given[0]}.")
    from hydra_hf.training.tokenizer_trainer import train_tokenizer

    print(train_tokenizer(recipe, output_dir, on_stage=print))


def _train_hydra(recipe, output_dir: Path, options: argparse.Namespace) -> None:
    from dataclasses import replace

    from hydra_hf.training.batches import partial_state

    if options.num_workers is not None:
        recipe = replace(recipe, num_workers=options.num_workers)
    if options.dry_run:
        from hydra_hf.training.dry_run import dry_run

        result = "\n\n".join(map(str, dry_run(recipe, options.stage)))
    else:
        from hydra_hf.training.hydra_trainer import train_hydra

        result = train_hydra(recipe, output_dir, only=options.stage, on_stage=print)
    if partial_state().is_main_process:
        print(result)


def _given(options: argparse.Namespace, parameters: Mapping[str, Parameter]) -> dict[str, str]:
    """What a recipe's function is called with. ValueError for an option that it does not have, or one that it lacks."""
    values = {name: getattr(options, name) for name in ("tokenizer", "init", "teacher", "decoder")}
    given = {name: value for name, value in values.items() if value is not None}
    if unknown := sorted(set(given) - set(parameters)):
        raise ValueError(f"The recipe {options.recipe} takes no --{unknown[0]}.")
    required = {name for name, parameter in parameters.items() if parameter.default is Parameter.empty}
    if missing := sorted(required - set(given)):
        raise ValueError(f"The recipe {options.recipe} needs --{missing[0]}.")
    return given


def _override(recipe, options: argparse.Namespace):
    """The recipe with the options that replace its fields or its stages'."""
    from dataclasses import replace

    from hydra_hf.data.readers import parse_source

    sources = {
        name: tuple(map(parse_source, getattr(options, name))) if getattr(options, name) else None
        for name in ("data", "held_out")
    }
    fields = {"data": sources["data"]} | {
        name: getattr(options, name) for name in ("micro_batch_size", "gradient_checkpointing")
    }
    stage_fields = {"held_out": sources["held_out"]} | {
        name: getattr(options, name) for name in ("num_steps", "lora_rank", *STAGE_OPTIONS)
    }
    recipe = replace(recipe, **{name: value for name, value in fields.items() if value is not None})
    return recipe.with_overrides(**{name: value for name, value in stage_fields.items() if value is not None})


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


def convert(options: argparse.Namespace) -> None:
    from hydra_hf.conversion.convert import convert as run

    print(
        run(
            options.vision,
            options.out,
            options.language,
            decoder=options.decoder,
            num_gen_layers=options.num_gen_layers,
            dtype=options.dtype,
            shard_size=options.shard_size,
            seed=options.seed,
            revision=options.revision,
            language_revision=options.language_revision,
        )
    )


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
