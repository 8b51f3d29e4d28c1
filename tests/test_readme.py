"""The README is true: its blocks run, its tree and its numbers are those of the repository."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hydra_hf
from doc_commands import check_command, code_blocks, hydra_commands, run_hydra
from hydra_hf.cli import main


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return code_blocks(README, language)


def test_there_are_exactly_two_commands_for_a_fresh_machine():
    commands = [line for line in blocks("sh")[0].splitlines() if line and not line.startswith("#")]
    assert [shlex.split(line, comments=True)[:2] for line in commands] == [["make", "try"], ["make", "test"]]
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in ("try", "test"))


def test_ci_runs_the_two_commands_and_builds_the_site():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make try", "make test", "make docs"} <= set(ci)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_block_runs(index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__readme__"}
    exec(compile(blocks("python")[index], f"README block {index}", "exec"), names)
    (result,) = (names[name] for name in ("image", "picture", "decoded", "patches") if name in names)
    pixels = result.detach().float() if isinstance(result, torch.Tensor) else result
    assert np.asarray(pixels, dtype=float).std() > 0.001  # not one colour; noise is rebuilt as almost grey
    assert bool(capsys.readouterr().out.strip()) == ("print(" in blocks("python")[index])


def test_the_readme_has_commands_of_full_size():
    launched = [command for command in hydra_commands(README) if "--data" in command]
    assert len(launched) >= 7


@pytest.mark.parametrize("command", hydra_commands(README), ids=" ".join)
def test_command_is_what_the_parser_takes(command):
    check_command(command)


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
