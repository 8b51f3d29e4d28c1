"""How the command starts and ends: help on one screen, no torch before it is needed, pipes, terminals that show pictures."""

import json
import os
import pty
import re
import select
import subprocess
import sys
from fcntl import ioctl
from runpy import run_module
from struct import pack
from termios import TIOCSWINSZ

import pytest

import hydra_hf
from hydra_hf.cli import VERBS, create_parser, main


HYDRA = "import sys; from hydra_hf_command import main; sys.exit(main())"


def run(code: str, *arguments: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **kwargs)


def test_help_is_one_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24  # the last line of the screen is the next prompt's
    assert max(map(len, lines)) <= 80
    for verb in VERBS:  # each on a line of its own
        name = verb.__name__.rpartition(".")[-1]
        assert len([line for line in lines if re.match(rf" +{name} +[a-z]", line)]) == 1, name


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["ask", "cat.png"], 2),
        (["generate", "a cat", "--out", "cat.png", "--num_inference_steps", "ten"], 2),
        (["ask", "nowhere.png", "what?"], 2),
        (["reconstruct", "nowhere.png", "--out", "x.png"], 2),
        (["generate", "a cat", "--out", "cat.txt"], 2),
        (["generate", "a cat", "--out", "cat.png", "--model", "/no/such/folder"], 2),
        (["train", "tiny.nothing"], 2),
    ],
    ids=str,
)
def test_help_and_wrong_arguments_need_no_torch(arguments, code):
    watched = HYDRA.replace(
        "sys.exit(main())", "import atexit; atexit.register(lambda: print(*sys.modules)); sys.exit(main())"
    )
    result = run(watched, *arguments)
    assert result.returncode == code, result.stderr
    modules = result.stdout.splitlines()[-1].split()
    assert "hydra_hf.cli" in modules
    assert not {"torch", "transformers", "diffusers"} & set(modules)
    assert "Traceback" not in result.stderr


def test_the_command_registers_the_auto_classes_with_the_first_name_that_is_used():
    code = """
import hydra_hf_command, sys, hydra_hf
assert "torch" not in sys.modules
hydra_hf.HydraPipeline
from transformers import AutoConfig
print(type(AutoConfig.for_model("hydra")) is hydra_hf.HydraConfig, set(hydra_hf.__all__) <= set(dir(hydra_hf)))
"""
    assert run(code).stdout.split() == ["True", "True"]


def test_the_package_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hydra", "--version"])
    with pytest.raises(SystemExit) as ended:
        run_module("hydra_hf", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out.strip()) == (0, hydra_hf.__version__)


# Pipes and results


def answering(results: str, print_first: str = "'for people'") -> str:
    """The command with an `ask` that only returns `results`."""
    fake = f"import hydra_hf.cli.ask as ask; ask.check_readable = print; ask.run = lambda options: print({print_first}) or {results}"
    return HYDRA.replace("sys.exit", f"{fake}; sys.exit")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ask", "x.png", "what?"], ["ask", "x.png", "what?", "--json"]], ids=" ".join
)
def test_a_reader_that_leaves_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", answering("{'answer': 'cat'}"), *arguments]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # otherwise argparse hides it, and the code is 0
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert result.returncode == 141
    assert result.stderr == ("for people\n" if "--json" in arguments else "")


@pytest.mark.parametrize("arguments", [["--json", "ask", "x.png", "what?"], ["ask", "x.png", "what?", "--json"]])
def test_json_is_alone_on_stdout(arguments):
    result = run(answering("iter([{'answer': 'cat'}, None, {'answer': 'Z\\u00fcrich'}])"), *arguments)
    assert [json.loads(line)["answer"] for line in result.stdout.splitlines()] == ["cat", "Zürich"]
    assert result.stderr == "for people\n"


def test_a_number_that_json_does_not_have_is_null():
    result = run(answering("{'psnr': float('inf'), 'scores': [float('nan'), 1.5]}"), "--json", "ask", "x.png", "what?")
    assert result.stdout == '{"psnr": null, "scores": [null, 1.5]}\n'


def test_without_json_the_result_is_for_people():
    assert run(answering("{'answer': 'cat'}"), "ask", "x.png", "what?").stdout == "for people\n"


def test_every_command_takes_json():
    for command in (
        ["prepare", "index", "--data", "generate=x"],
        ["chat"],
        ["train", "tiny.hydra"],
        ["convert", "--vision", "x", "--out", "y"],
    ):
        assert create_parser().parse_args([*command, "--json"]).json is True
        assert create_parser().parse_args(["--json", *command]).json is True
        assert create_parser().parse_args(command).json is False


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("peft", "the package peft is not installed: pip install hydra_hf[train]"),
        ("nothing_of_ours", "the package nothing_of_ours is not installed"),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(monkeypatch, capsys, missing, message):
    def run(options):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr("hydra_hf.cli.ask.run", run)
    assert main(["ask", "x.png", "what?"]) == 2
    assert capsys.readouterr().err == f"hydra ask: {message}\n"


def test_a_module_of_our_own_that_is_missing_keeps_its_traceback(monkeypatch):
    def run(options):
        import hydra_hf.nothing  # noqa: F401

    monkeypatch.setattr("hydra_hf.cli.ask.run", run)
    with pytest.raises(ModuleNotFoundError):
        main(["ask", "x.png", "what?"])


# Shells


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_options_recipes_and_files(capsys, shell):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--completion", shell])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert all(
        word in script for word in ("reconstruct", "guidance_scale", "tiny.tokenizer", "micro_batch_tokens", "hydra")
    )
    if shell == "bash":
        assert "_shtab_hydra_ask_pos_0_COMPGEN=_shtab_compgen_files" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=True).returncode == 0


def test_completion_of_an_unknown_shell_is_one_line(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--completion", "ksh"])
    assert ended.value.code == 2
    assert "ksh is not one of bash, zsh" in capsys.readouterr().err


# Terminals

SHOW = """
import contextlib, sys, hydra_hf_command
from PIL import Image
from hydra_hf.cli.common import show_image
with contextlib.redirect_stdout({stdout}):
    show_image(Image.linear_gradient("L").convert("RGB"))
print("shown")
"""
KITTY_PLACEHOLDER = "\U0010eeee".encode()  # a cell that the terminal fills with a part of the picture
KITTY_QUESTION = re.compile(rb"\x1b_Gi=(\d+),[^\x1b]*a=q[^\x1b]*\x1b\\")


def on_terminal(code: str, answers) -> bytes:
    """What `code` writes to a terminal of 80x24 cells of 10x20 pixels, which answers questions with `answers(written)`."""
    terminal, side = pty.openpty()
    ioctl(side, TIOCSWINSZ, pack("HHHH", 24, 80, 800, 480))
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=side, stdout=side, stderr=subprocess.PIPE, env=environment
    )
    os.close(side)
    written, answered = b"", 0
    while select.select([terminal], [], [], 60)[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the process has ended
            break
        written += part
        for answer in answers(written)[answered:]:
            os.write(terminal, answer)
            answered += 1
    os.close(terminal)
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    assert b"shown" in written
    return written


def sixels(written: bytes) -> list[bytes]:
    return [b"\x1b[?62;4;6c"] * written.count(b"\x1b[c")


def kitty(written: bytes) -> list[bytes]:
    answers = [b"\x1b[?62;c"] * written.count(b"\x1b[c")
    return answers + [b"\x1b_Gi=%b;OK\x1b\\" % number for number in KITTY_QUESTION.findall(written)]


def plain(written: bytes) -> list[bytes]:
    return [b"\x1b[?62;c"] * written.count(b"\x1b[c")


def test_a_terminal_that_shows_pictures_is_shown_them():
    pytest.importorskip("textual_image")
    assert b"\x1bP" in on_terminal(SHOW.format(stdout="sys.stdout"), sixels)
    assert KITTY_PLACEHOLDER in on_terminal(SHOW.format(stdout="sys.stdout"), kitty)


def test_a_terminal_that_cannot_is_shown_nothing():
    pytest.importorskip("textual_image")
    written = KITTY_QUESTION.sub(b"", on_terminal(SHOW.format(stdout="sys.stdout"), plain))
    assert written.replace(b"\x1b[c", b"").strip() == b"shown"


def test_nothing_is_shown_where_stdout_is_not_the_terminal():
    pytest.importorskip("textual_image")
    assert run(SHOW.format(stdout="sys.stdout")).stdout == "shown\n"
    assert on_terminal(SHOW.format(stdout="sys.stderr"), sixels).strip() == b"shown"  # as with --json
