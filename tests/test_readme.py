"""The README is true: its blocks run, its tree and its numbers are those of the repository."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch

import hydra_hf
from hydra_hf.cli import create_parser, main


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run_hydra(line: str, folder: Path) -> str:
    """One command line of the README; training runs take two steps instead of thousands."""
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


def test_there_are_exactly_two_commands_for_a_fresh_machine():
    commands = [line for line in blocks("sh")[0].splitlines() if line and not line.startswith("#")]
    assert [shlex.split(line, comments=True)[:2] for line in commands] == [["make", "try"], ["make", "test"]]
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in ("try", "test"))


def test_ci_runs_the_two_commands():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make try", "make test"} <= set(ci)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_block_runs(index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__readme__"}
    exec(compile(blocks("python")[index], f"README block {index}", "exec"), names)
    (result,) = (names[name] for name in ("image", "picture", "decoded", "patches") if name in names)
    pixels = result.detach().float() if isinstance(result, torch.Tensor) else result
    assert np.asarray(pixels, dtype=float).std() > 0.01  # not one colour
    assert bool(capsys.readouterr().out.strip()) == ("print(" in blocks("python")[index])


def full_size_commands() -> list[list[str]]:
    """The commands of the sections on full size, lines joined, as arguments of `hydra`."""
    text = "\n".join(block for block in blocks("text") if "hydra convert" in block)
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    commands = [line[line.index("hydra_hf.cli") + 1 :] if "hydra_hf.cli" in line else line[1:] for line in lines
                if "hydra_hf.cli" in line or line[:1] == ["hydra"]]  # fmt: skip
    assert len(commands) >= 7
    return commands


@pytest.mark.parametrize("command", full_size_commands(), ids=" ".join)
def test_commands_of_full_size_are_what_the_parser_takes(command):
    options = create_parser().parse_args(command)
    if options.command == "train":
        module, function = options.recipe.split(".")
        recipe_module = import_module(f"hydra_hf.training.recipes.{module}")
        parameters = signature(getattr(recipe_module, function)).parameters
        assert {"init", "tokenizer"} & {name for name in vars(options) if getattr(options, name)} <= set(parameters)
        assert options.data or options.dry_run


def test_settings_of_launchers_that_the_readme_names_are_there():
    names = re.findall(r"examples/[\w/]+\.\w+", README)
    assert names
    for name in names:
        assert (ROOT / name).is_file(), name


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(blocks("bash"))))
def test_command_block_runs(index, tmp_path):
    lines = [line for line in blocks("bash")[index].splitlines() if line.startswith("hydra ")]
    assert lines
    run_hydra('hydra generate "a cat" --out cat.png', tmp_path)
    for line in lines:
        run_hydra(line, tmp_path)


def test_the_dialogue_is_what_the_embedded_model_says(tmp_path, monkeypatch, capsys):
    (block,) = [block for block in blocks("text") if "$ hydra chat" in block]
    command, *lines = block.splitlines()
    monkeypatch.chdir(tmp_path)
    said = [line.removeprefix("> ") for line in lines if line.startswith("> ")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(said)))
    assert main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out.splitlines() == [line for line in lines if not line.startswith("> ")]
    assert (tmp_path / "drawn" / "001.png").is_file()


def test_the_tree_in_the_readme_is_the_tree():
    (tree,) = (block for block in blocks("text") if "modeling/" in block)
    named = set(re.findall(r"(\w+\.py)\b", tree))
    present = {path.name for path in (ROOT / "src" / "hydra_hf").rglob("*.py") if path.name != "__init__.py"}
    assert named == present


def test_the_scores_in_the_readme_are_those_of_the_checkpoint():
    scores = json.loads((Path(hydra_hf.TINY) / "scores.json").read_text())
    rows = dict(re.findall(r"^\| `([\w/]+)` \| ([\d.]+) \|", README, flags=re.MULTILINE))
    sides = (48, 64, 80, 96, 112, 128)
    for height in sides:  # a table of its own, a row for each height
        (row,) = re.findall(
            rf"^\| {height} \|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|", README, re.MULTILINE
        )
        rows |= {f"t2i_size/{height}x{width}": value for width, value in zip(sides, row) if value.strip()}
    assert set(rows) == {name for name in scores if "/" in name}
    for name, value in rows.items():
        assert float(value) == round(scores[name], 3 if "reconstruction" not in name else 2), name
