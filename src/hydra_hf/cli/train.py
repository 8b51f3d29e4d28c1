"""Train a recipe, or resume it.

example: hydra train tiny.tokenizer --out runs/tiny.tokenizer
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import TextIO

from .common import add_device, check_out_folder, use_device
from .recipe_options import add_recipe_options, classes_of, option_fields, recipe_function, recipe_names


PARAMETERS = {
    "tokenizer": "the trained vision tower (HYDRA-TOK): the `final` folder that a recipe of hydra_tok leaves, or a Hub id",
    "init": "the weights to start from: the folder that `hydra convert` writes, or a Hub id",
    "video_teacher": "a video model to distill from, such as V-JEPA 2 or VideoMAE, a folder or Hub id",
    "teacher": "the ViT to distill from, a folder, Hub id or timm:NAME; --init where the recipe needs none",
    "model": "the model to be trained, a folder or Hub id",
    "decoder": "size of the flow decoder: S, M or L",
    "mixture": "unimrg, or sft, reca, depth or segment to compare with",
}  # what functions of recipes take


def add_options(command: argparse.ArgumentParser) -> None:
    names = recipe_names()
    command.usage = "hydra train RECIPE [options]"
    command.add_argument("recipe", choices=names, metavar="RECIPE", help=f"one of {', '.join(names)}")
    command.add_argument(
        "--out", type=Path, help="folder of the run; runs/RECIPE by default. An unfinished one is resumed"
    )
    command.add_argument("--stage", help="train only this stage")
    add_device(command)
    command.add_argument(
        "--dry_run", action="store_true", default=None, help="print what a step sees and costs, without training"
    )
    command.add_argument("--num_processes", type=int, help="for a dry run: the number of processes to assume")
    command.epilog += (
        "\nEvery field of a recipe and of its stages is an option: `hydra train RECIPE --help` lists them."
    )
    command.add_late_options = partial(add_late_options, command)


def add_late_options(command: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Adds the options of the recipes that are named in `arguments`."""
    for name in recipe_names():
        if name in arguments:
            add_recipe_options(command, name, PARAMETERS)


def run(options: argparse.Namespace) -> dict | None:
    if options.num_processes is not None and not options.dry_run:
        raise ValueError(
            "--num_processes goes with --dry_run; a training on several processes is started by torchrun or accelerate."
        )
    check_out_folder(options.out or Path("runs"))
    use_device(options.device)
    make = recipe_function(options.recipe)
    recipe = override(make(**_given(options, make)), options, make)
    for path in unused_data(recipe):
        _print_once(f"--data {path}: no stage of {recipe.name} trains this task, see --tasks.", sys.stderr)
    if options.dry_run:
        from hydra_hf.training.dry_run import dry_run

        reports = dry_run(recipe, options.stage, options.num_processes)
        _print_once("\n\n".join(map(str, reports)))
        return _once({"recipe": recipe.name, "stages": [asdict(report) for report in reports]})
    folder = _train(recipe, options.out or Path("runs") / recipe.name, options.stage)
    _print_once(folder)
    return _once({"recipe": recipe.name, "path": str(folder)})


def unused_data(recipe) -> list[str]:
    """The sources, as TASK=PATH, whose task is in no stage; a tokenizer trains on all."""
    from hydra_hf.data.sources import Sources
    from hydra_hf.training.recipe import HydraRecipe

    if not isinstance(recipe, HydraRecipe):
        return []
    trained = {task for stage in recipe.stages for task in stage.tasks}
    found = [recipe.data_of(stage) for stage in recipe.stages]
    sources = dict.fromkeys(source for data in found if isinstance(data, Sources) for source in data.sources)
    return [f"{source.task}={source.path}" for source in sources if source.task not in trained]


def _train(recipe, output_dir: Path, stage: str | None) -> Path:
    """Trains and returns the folder of the result. A run that is asked to stop exits with 128 plus the signal's number, as in
    shells."""
    from hydra_hf.training.interruption import TrainingInterruptedError

    try:
        return _trainer_of(recipe)(recipe, output_dir, only=stage, on_stage=print)
    except TrainingInterruptedError as error:
        _print_once(f"hydra train: {error}", sys.stderr)
        raise SystemExit(128 + error.signum) from error


def _trainer_of(recipe) -> Callable:
    from hydra_hf.training.recipe import HydraRecipe, UnifiedRecipe

    if isinstance(recipe, UnifiedRecipe):
        from hydra_hf.training.adapters import train_unified as train
    elif isinstance(recipe, HydraRecipe):
        from hydra_hf.training.hydra_trainer import train_hydra as train
    else:
        from hydra_hf.training.vision_tower_trainer import train_tokenizer as train
    return train


def _print_once(text: object, file: TextIO | None = None) -> None:
    if _once(text) is not None:
        print(text, file=file)


def _once(value):
    """The value on the main process, None on the others."""
    from hydra_hf.training.processes import partial_state

    return value if partial_state().is_main_process else None


def _given(options: argparse.Namespace, make: Callable) -> dict[str, str | int]:
    """The arguments of a recipe's function. Raises ValueError for one that is missing, or is no model's name."""
    from hydra_hf.hub import check_model_name

    parameters = signature(make).parameters
    given = {name: value for name in parameters if (value := getattr(options, name)) is not None}
    for name in {"tokenizer", "init", "model"} & set(given):
        check_model_name(given[name])
    if "tokenizer" in parameters and "tokenizer" not in given:
        _check_trained(options.recipe, parameters["tokenizer"].default)
    for name, parameter in parameters.items():
        if parameter.default is Parameter.empty and name not in given:
            raise ValueError(f"The recipe {options.recipe} needs --{name}: {PARAMETERS[name]}.")
    return given


def _check_trained(recipe: str, default: str | None) -> None:
    """Raises ValueError if the recipe's default tokenizer has not been trained yet."""
    if isinstance(default, str) and not Path(default).is_dir():
        raise ValueError(
            f"The recipe {recipe} starts from a trained tokenizer, and there is no folder {default}: run"
            f" `hydra train {Path(default).parts[1]}` first, or name a folder or Hub id with --tokenizer."
        )


def override(recipe, options: argparse.Namespace, make: Callable):
    """The recipe with the options that replace its fields, or those of all of its stages.

    Of `loss_weights`, only the named ones are replaced. Raises ValueError for a name that is none of them.
    """
    from dataclasses import replace

    from hydra_hf.data.sources import Sources

    of_recipe, of_stages = (
        {field.name: getattr(options, field.name) for field, *_ in option_fields(owner)} for owner in classes_of(make)
    )
    known = set(signature(make).parameters)  # which the function has taken
    given = {name: Sources(tuple(value)) if isinstance(value, list) else value
             for name, value in (of_recipe | of_stages).items() if value is not None and name not in known}  # fmt: skip
    weights = given.pop("loss_weights", {})
    of_stage = {name: value for name, value in given.items() if name in of_stages}
    stages = tuple(replace(stage, **of_stage, **_weights(stage, weights)) for stage in recipe.stages)
    return replace(recipe, stages=stages, **{name: value for name, value in given.items() if name not in of_stages})


def _weights(stage, given: dict[str, float]) -> dict:
    """The stage's `loss_weights` with the given ones replaced, as its field."""
    from dataclasses import replace

    known = vars(stage.loss_weights)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"--loss_weights {unknown[0]}={given[unknown[0]]} names no loss, expected {', '.join(known)}."
        )
    return {"loss_weights": replace(stage.loss_weights, **given)} if given else {}
