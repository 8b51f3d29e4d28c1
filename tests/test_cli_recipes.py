"""The options of `hydra train RECIPE`, made from the recipe's function and dataclasses."""

from collections.abc import Callable
from dataclasses import fields

import pytest
from torch import nn

from hydra_hf.cli import create_parser
from hydra_hf.cli.recipe_options import argument_texts, option_fields, option_settings, recipe_function, recipe_names
from hydra_hf.training.recipe import (
    HydraLossWeights,
    HydraRecipe,
    HydraStage,
    Recipe,
    TokenizerStage,
    UnifiedLossWeights,
    UnifiedRecipe,
)


def parse(*words: str):
    return create_parser().parse_args(["train", *words])


def error_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hydra train: ")
    return line


def test_the_recipes_read_from_the_source_are_those_that_can_be_called():
    names = recipe_names()
    assert {"tiny.tokenizer", "tiny.hydra", "hydra.hydra_1_5b", "unimrg.janus", "hydra_x_tok.siglip2_so400m"} <= set(
        names
    )
    assert all(callable(recipe_function(name)) for name in names)
    assert not {"hydra.recipe_of", "hydra.stages", "tiny.hydra_config"} & set(names)


@pytest.mark.parametrize(
    ("owner", "unwritable"),
    [
        (Recipe, {"name", "config", "stages"}),
        (HydraRecipe, {"name", "config", "stages", "processor"}),
        (UnifiedRecipe, {"name", "config", "stages", "processor", "model_class"}),
        (TokenizerStage, {"name", "decoder_config"}),
        (HydraStage, {"name"}),
    ],
)
def test_every_field_that_can_be_written_is_an_option(owner, unwritable):
    names = [field.name for field, *_ in option_fields(owner)]
    assert set(names) == {field.name for field in fields(owner)} - unwritable


def test_options_have_the_help_of_the_docstring():
    texts = {field.name: text for field, _, text in option_fields(TokenizerStage)}
    assert texts["distill_layers"].startswith(
        "blocks, counted from 1, whose outputs are trained to match the teacher's; ()"
    )
    assert texts["ema_decay"].startswith("decay of the average")  # of the parent class
    assert texts["frechet_weights"] == texts["frechet_backbone"]  # described together
    assert argument_texts("A thing.\n\n    Args:\n        a: one,\n            two.\n        b, c: 3.\n\n    Raises ValueError.") == {
        "a": "one, two", "b": "3", "c": "3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("annotation", "words", "expected"),
    [
        (int | None, ["3"], 3),
        (float, ["1e-4"], 1e-4),
        (str | Callable[[], nn.Module] | None, ["timm:vit"], "timm:vit"),
        (tuple[int, ...], ["1", "2"], (1, 2)),
        (tuple[str, ...], [], ()),
        (dict[str, float], ["a.b=1e-3", "c=2"], {"a.b": 1e-3, "c": 2.0}),
        (HydraLossWeights | UnifiedLossWeights, ["flow=0.5"], {"flow": 0.5}),
    ],
    ids=str,
)
def test_a_type_is_read_from_words(annotation, words, expected):
    from hydra_hf.cli.parser import Parser

    parser = Parser()
    parser.add_argument("--field", **option_settings(annotation))
    assert parser.parse_args(["--field", *words]).field == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_steps", "x"], "argument --num_steps: got 'x', expected an integer"),
        (["--num_steps", "1.5"], "argument --num_steps: got '1.5', expected an integer"),
        (["--drop_prompt", "nan"], "argument --drop_prompt: got 'nan', expected a number"),
        (["--tasks", "generate"], "argument --tasks: got 'generate', expected NAME=VALUE"),
        (["--tasks", "generate=many"], "argument --tasks: got 'many', expected an integer"),
        (["--data", "images"], "argument --data: The source 'images' is not TASK=PATH"),
        (["--num_stesp", "3"], "unexpected '--num_stesp', did you mean --num_steps?"),
        (["--distill_layers", "3"], "unexpected '--distill_layers'"),  # of a tokenizer's stage
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_wrong_value_names_the_field_the_value_and_what_was_expected(capsys, words, message):
    assert message in error_of(capsys, "tiny.hydra", *words)


def test_the_recipe_may_stand_after_its_options():
    options = parse("--num_steps", "3", "tiny.hydra", "--no-gradient_checkpointing")
    assert (options.recipe, options.num_steps, options.gradient_checkpointing) == ("tiny.hydra", 3, False)


def test_a_field_that_is_not_named_stays_unset():
    options = parse("tiny.tokenizer")
    assert {getattr(options, field.name) for field, *_ in option_fields(TokenizerStage)} == {None}


def test_help_of_a_recipe_lists_its_fields(capsys):
    with pytest.raises(SystemExit):
        parse("tiny.tokenizer", "--help")
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field, *_ in option_fields(TokenizerStage))
    assert "--sample_prompts" not in text
