"""Blocks of code and commands of `hydra` in Markdown: what the parser takes, and what runs."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

from hydra_hf.cli import create_parser
from hydra_hf.data.sources import parse_source


def code_blocks(markdown: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)


def hydra_commands(markdown: str) -> list[list[str]]:
    """The arguments of every `hydra` in the blocks of commands, lines joined, also of those that a launcher starts."""
    commands = []
    for line in "\n".join(code_blocks(markdown, "(?:bash|text)")).replace("\\\n", " ").splitlines():
        if match := re.match(r"(?:\$ )?hydra (?=\w+(?: |$))|.* -m hydra_hf\.cli ", line):
            words = shlex.split(line[match.end() :], comments=True)
            ends = [index for index, word in enumerate(words) if re.match(r"\d?[<>|&]", word)]
            commands.append(words[: min(ends, default=len(words))])
    return commands


def check_command(command: list[str]) -> None:
    """The parser takes it; a recipe of `hydra train` is there and takes the folders that it is given."""
    if "--help" in command:
        return
    options = create_parser().parse_args(command)
    if options.command == "train":
        module, function = options.recipe.split(".")
        recipe_module = import_module(f"hydra_hf.training.recipes.{module}")
        parameters = signature(getattr(recipe_module, function)).parameters
        assert {"init", "tokenizer"} & {name for name in vars(options) if getattr(options, name)} <= set(parameters)
        assert options.data or options.dry_run or module in ("tiny", "tiny_x")
        for source in options.data or ():
            assert not isinstance(source, str) or parse_source(source)


def run_hydra(line: str, folder: Path) -> str:
    """What a command line prints; training runs take two steps instead of thousands."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["hydra", "train"]:
        words += ["--num_steps", "2"]
    if words[:2] == ["hydra", "evaluate"]:
        words += ["--prompts_per_category", "2", "--num_questions", "4", "--num_scenes", "2"]
        words += ["--prompts_per_kind", "1", "--prompts_per_size", "1", "--num_captions", "2", "--edits_per_kind", "1"]
    command = [sys.executable, "-m", "hydra_hf.cli", *words[1:]]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
