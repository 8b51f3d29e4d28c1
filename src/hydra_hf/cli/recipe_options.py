"""The options of `hydra train RECIPE`: what the recipe's function takes, the fields of the recipe, and those of its stages.

Names, types and help are those of the function and the dataclasses, so a new field of a recipe is an option at once.
"""

import argparse
import ast
import inspect
import re
from argparse import ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .parser import read_integer, read_number


RECIPES = Path(__file__).parents[1] / "training" / "recipes"
WRITABLE = {"str", "str | None", "int"}  # types of the parameters of a recipe's function


def recipe_names() -> list[str]:
    """module.function of every recipe, read from the source: importing a recipe brings torch."""
    names = []
    for path in sorted(RECIPES.glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_recipe = (
                isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns is not None
            )
            if is_recipe and ast.unparse(node.returns).endswith("Recipe"):
                types = {ast.unparse(argument.annotation) for argument in node.args.args if argument.annotation}
                names += [f"{path.stem}.{node.name}"] if types <= WRITABLE else []
    return names


def recipe_function(name: str) -> Callable:
    """The function that makes the recipe `name`."""
    module, _, function = name.partition(".")
    return getattr(import_module(f"hydra_hf.training.recipes.{module}"), function)


def classes_of(make: Callable) -> tuple[type, type]:
    """The class of the recipe that `make` returns, and that of its stages."""
    from hydra_hf.training.recipe import HydraRecipe, HydraStage, TokenizerStage

    recipe_class = get_type_hints(make)["return"]
    return recipe_class, HydraStage if issubclass(recipe_class, HydraRecipe) else TokenizerStage


def add_recipe_options(command: argparse.ArgumentParser, name: str, parameters: dict[str, str]) -> None:
    """Adds the options of the recipe `name` that `command` does not have yet; `parameters` is help by name."""
    make = recipe_function(name)
    hints = get_type_hints(make)
    group = command.add_argument_group(f"what {name} takes")
    for parameter in inspect.signature(make).parameters:
        _add_option(command, group, parameter, hints[parameter], parameters.get(parameter))
    for kind, owner in zip(("recipe", "stages"), classes_of(make)):
        group = command.add_argument_group(f"fields of the {kind} ({owner.__name__})")
        for field, annotation, text in option_fields(owner):
            _add_option(command, group, field.name, annotation, text)


def option_fields(owner: type) -> Iterator[tuple[Field, Any, str | None]]:
    """The fields of a dataclass that can be written on the command line, with type and help; a name is none of them."""
    hints, texts = get_type_hints(owner), {}
    for parent in reversed(owner.__mro__):
        texts |= argument_texts(parent.__doc__ or "")
    for field in fields(owner):
        if field.name != "name" and option_settings(hints[field.name]) is not None:
            yield field, hints[field.name], texts.get(field.name)


def _add_option(command: argparse.ArgumentParser, group, name: str, annotation, text: str | None) -> None:
    if f"--{name}" not in command._option_string_actions:
        group.add_argument(
            f"--{name}", default=None, help=text and text.replace("%", "%%"), **option_settings(annotation)
        )


def argument_texts(docstring: str) -> dict[str, str]:
    """name -> text, of the part `Args:` of a docstring."""
    arguments = dedent(inspect.cleandoc(docstring).partition("Args:\n")[2].partition("\n\n")[0])
    found = re.findall(r"^([a-z]\w*(?:, \w+)*): (.+(?:\n .+)*)", arguments, flags=re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for names, text in found for name in names.split(", ")}


# What a type looks like on the command line


SCALARS = {int: read_integer, float: read_number, str: str}


class Collect(argparse.Action):
    """Several values as one: a tuple, or a dict of pairs (`const`)."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, self.const(values))


def option_settings(annotation) -> dict[str, Any] | None:
    """The arguments of `add_argument` for a value of this type; None if it cannot be written on the command line."""
    from hydra_hf.training.recipe import Data

    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in SCALARS:
        return {"type": annotation, "metavar": annotation.__name__.upper()}
    if annotation is bool:
        return {"action": BooleanOptionalAction}
    if annotation is Data:
        return {"type": read_source, "action": "append", "metavar": "TASK=PATH"}
    if origin is tuple and arguments[1:] == (...,) and arguments[0] in SCALARS:
        settings = option_settings(arguments[0])
        return {**settings, "action": Collect, "const": tuple, "nargs": "*"}
    if origin is dict and arguments[0] is str and arguments[1] in SCALARS:
        return _pairs(SCALARS[arguments[1]])
    if is_dataclass(annotation) and {field.type for field in fields(annotation)} == {float}:
        return _pairs(read_number)
    if origin not in (Union, UnionType):
        return None
    return next(filter(None, map(option_settings, arguments)), None)  # the first that can be written


def _pairs(read: Callable[[str], Any]) -> dict[str, Any]:
    def read_pair(text: str) -> tuple[str, Any]:
        name, separator, value = text.partition("=")
        if not separator:
            raise ArgumentTypeError(f"got {text!r}, expected NAME=VALUE")
        return name, read(value)

    return {"type": read_pair, "action": Collect, "const": dict, "nargs": "*", "metavar": "NAME=VALUE"}


def read_source(text: str):
    from hydra_hf.data.sources import parse_source

    try:
        return parse_source(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
