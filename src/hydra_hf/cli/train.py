"""Train a recipe, or resume it.

example: hydra train tiny.tokenizer --out runs/tiny.tokenizer
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from inspect import Parameter
from pathlib import Path
from typing import TextIO

from .common import add_device, check_out_folder, use_device


HYDRA_OPTIONS = ("num_workers", "max_length", "micro_batch_tokens")
STAGE_OPTIONS = {
    "teacher_weights": "safetensors of a timm teacher",
    "perceptual_backbone": "lpips:vgg, lpips:alex, lpips:squeeze or timm:NAME",
    "perceptual_weights": "safetensors of its trunk",
    "frechet_backbone": "timm:NAME of the network for a Frechet distance during training",
    "frechet_weights": "its safetensors",
}
STAGE_FIELDS = ("num_steps", "video_teacher_size", "lora_rank", "condition_grad_scale", *STAGE_OPTIONS)
NEEDED = {
    "tokenizer": "the `final` folder that a recipe of hydra_tok leaves, or a Hub id",
    "init": "the folder that `hydra convert` writes, or a Hub id",
    "video_teacher": "a video model to distill from, such as V-JEPA 2 or VideoMAE, a folder or Hub id",
    "teacher": "the ViT to distill from, a folder, Hub id or timm:NAME",
    "model": "the model to be trained, a folder or Hub id",
}  # options that a recipe may need


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="module.function in hydra_hf.training.recipes, such as tiny.hydra")
    command.add_argument(
        "--out", type=Path, help="folder of the run; runs/RECIPE by default. An unfinished one is resumed"
    )
    command.add_argument("--tokenizer", help="for HYDRA: the trained vision tower (HYDRA-TOK)")
    command.add_argument("--init", help="folder or Hub id to start from, such as `hydra convert` writes")
    command.add_argument("--model", help="for UniMRG: a unified model other than HYDRA, a folder or Hub id")
    command.add_argument(
        "--teacher", help="frozen ViT to distill from: folder, Hub id or timm:NAME; --init by default"
    )
    command.add_argument("--video_teacher", help="for HYDRA-XTok: frozen teacher of clips, a folder or Hub id")
    command.add_argument("--video_teacher_size", type=int, help="its width, instead of the recipe's")
    command.add_argument("--decoder", help="size of the flow decoder: S, M or L")
    command.add_argument("--mixture", help="for UniMRG: unimrg, or sft, reca, depth or segment to compare with")
    command.add_argument("--data", action="append", metavar="TASK=PATH", help="data to train on; may be repeated")
    command.add_argument(
        "--held_out", action="append", metavar="TASK=PATH", help="data to measure losses on, which is not trained on"
    )
    command.add_argument("--micro_batch_size", type=int, help="samples in memory at once; the rest is accumulated")
    command.add_argument(
        "--micro_batch_tokens",
        type=int,
        help="for HYDRA: tokens in memory at once, of samples packed without padding, instead of --micro_batch_size",
    )
    command.add_argument("--gradient_checkpointing", action="store_true", default=None, help="less memory, more time")
    for name, summary in STAGE_OPTIONS.items():
        command.add_argument(f"--{name}", help=summary)
    command.add_argument("--num_steps", type=int, help="for every stage, instead of the recipe's")
    command.add_argument("--save_every", type=int, help="steps from one checkpoint to the next")
    command.add_argument("--stage", help="train only this stage")
    command.add_argument("--lora_rank", type=int, help="for HYDRA: rank of adapters on the language model and Sem-ViT")
    command.add_argument(
        "--condition_grad_scale", type=float, help="for HYDRA: factor on gradients through given images"
    )
    command.add_argument(
        "--max_length", type=int, help="for HYDRA: most tokens of a sample; longer ones are skipped and counted"
    )
    command.add_argument("--num_workers", type=int, help="for HYDRA: processes that read ahead")
    add_device(command)
    command.add_argument(
        "--dry_run", action="store_true", default=None, help="print what a step sees and costs, without training"
    )
    command.add_argument("--num_processes", type=int, help="for a dry run: the number of processes to assume")


def run(options: argparse.Namespace) -> None:
    from importlib import import_module
    from inspect import signature

    from hydra_hf.training.recipe import HydraRecipe, Recipe, UnifiedRecipe

    module_name, _, function_name = options.recipe.partition(".")
    try:
        make = getattr(import_module(f"hydra_hf.training.recipes.{module_name}"), function_name)
        made = signature(make)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"There is no recipe {options.recipe!r}; see hydra_hf.training.recipes.") from error
    if made.return_annotation not in (Recipe, HydraRecipe, UnifiedRecipe):
        raise ValueError(f"{options.recipe!r} is not a function that returns a recipe; see hydra_hf.training.recipes.")
    if options.num_processes is not None and not options.dry_run:
        raise ValueError(
            "--num_processes goes with --dry_run; a training on several processes is started by torchrun or accelerate."
        )
    check_out_folder(options.out or Path("runs"))
    use_device(options.device)
    recipe = make(**_given(options, made.parameters))
    output_dir = options.out or Path("runs") / recipe.name
    if isinstance(recipe, UnifiedRecipe):
        from hydra_hf.training.adapters import train_unified as train
    elif isinstance(recipe, HydraRecipe):
        from hydra_hf.training.hydra_trainer import train_hydra as train
    elif given := [name for name in HYDRA_OPTIONS if getattr(options, name) is not None]:
        raise ValueError(f"The recipe {options.recipe} takes no --{given[0]}.")
    else:
        from hydra_hf.training.vision_tower_trainer import train_tokenizer as train
    recipe = _override(recipe, options)
    _print_once(
        _dry_run(recipe, options.stage, options.num_processes)
        if options.dry_run
        else _train(train, recipe, output_dir, options.stage)
    )


def _train(train: Callable, recipe, output_dir: Path, stage: str | None) -> Path:
    """Trains and returns the folder of the result. A run that is asked to stop exits with 128 plus the signal's number, as in
    shells."""
    from hydra_hf.training.interruption import TrainingInterruptedError

    try:
        return train(recipe, output_dir, only=stage, on_stage=print)
    except TrainingInterruptedError as error:
        _print_once(f"hydra train: {error}", sys.stderr)
        raise SystemExit(128 + error.signum) from error


def _dry_run(recipe, stage: str | None, num_processes: int | None) -> str:
    from hydra_hf.training.dry_run import dry_run

    return "\n\n".join(map(str, dry_run(recipe, stage, num_processes)))


def _print_once(text: object, file: TextIO | None = None) -> None:
    from hydra_hf.training.processes import partial_state

    if partial_state().is_main_process:
        print(text, file=file)


def _given(options: argparse.Namespace, parameters: Mapping[str, Parameter]) -> dict[str, str]:
    """The arguments of a recipe's function. Raises ValueError for an unknown option or a missing one."""
    from hydra_hf.hub import check_model_name

    names = ("tokenizer", "init", "model", "teacher", "video_teacher", "decoder", "mixture")
    values = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    if unknown := sorted(set(given) - set(parameters)):
        raise ValueError(f"The recipe {options.recipe} takes no --{unknown[0]}.")
    for name in {"tokenizer", "init", "model"} & set(given):
        check_model_name(given[name])
    if "tokenizer" in parameters and "tokenizer" not in given:
        _check_trained(options.recipe, parameters["tokenizer"].default)
    required = {name for name, parameter in parameters.items() if parameter.default is Parameter.empty}
    if missing := sorted(required - set(given)):
        raise ValueError(f"The recipe {options.recipe} needs --{missing[0]}: {NEEDED[missing[0]]}.")
    return given


def _check_trained(recipe: str, default: str | Parameter.empty) -> None:
    """Raises ValueError if the recipe's default tokenizer has not been trained yet."""
    if isinstance(default, str) and not Path(default).is_dir():
        raise ValueError(
            f"The recipe {recipe} starts from a trained tokenizer, and there is no folder {default}: run"
            f" `hydra train {Path(default).parts[1]}` first, or name a folder or Hub id with --tokenizer."
        )


def _override(recipe, options: argparse.Namespace):
    """The recipe with the options that replace its fields or its stages'."""
    from dataclasses import replace

    from hydra_hf.data.sources import Sources, parse_source

    sources = {
        name: Sources(tuple(map(parse_source, getattr(options, name))))
        for name in ("data", "held_out")
        if getattr(options, name)
    }
    names = ("micro_batch_size", "gradient_checkpointing", "save_every", *HYDRA_OPTIONS)
    fields = {name: getattr(options, name) for name in names}
    stage_fields = sources | {name: getattr(options, name) for name in STAGE_FIELDS}
    recipe = replace(recipe, **{name: value for name, value in fields.items() if value is not None})
    return recipe.with_overrides(**{name: value for name, value in stage_fields.items() if value is not None})
