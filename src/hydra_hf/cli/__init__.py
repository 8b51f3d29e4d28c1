"""hydra generate | edit | ask | chat | reconstruct | serve | demo | prepare | train | evaluate | report | convert | push: a file each.

A verb is a module with `add_options(command)` and `run(options)`, which prints for people and returns its result for programs,
as a dict of JSON values, or yields several: `--json` prints these. Modules of verbs import nothing heavy at their top.
"""

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from io import TextIOWrapper
from json import dumps, loads

from huggingface_hub.errors import StrictDataclassError

from . import (
    ask,
    chat,
    convert,
    demo,
    edit,
    evaluate,
    generate,
    prepare,
    push,
    reconstruct,
    report,
    serve,
    train,
)
from .parser import Formatter, Parser, PrintCompletion


VERBS = (
    generate, edit, ask, chat, reconstruct, serve, demo, prepare, train, evaluate, report, convert, push,
)  # fmt: skip
LESS_MEMORY = {
    "micro_batch_size": "a lower --micro_batch_size",
    "gradient_checkpointing": "--gradient_checkpointing",
    "max_length": "a lower --max_length",
    "height": "a lower --height and --width",
    "image": "a smaller image",
    "dtype": "--dtype bfloat16",
}  # what helps, by the option that a verb has
INTERRUPTED, READER_GONE = 130, 141  # 128 plus the number of SIGINT, and of SIGPIPE, as in shells


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2, with one line on stderr, for a wrong argument, file or config, a missing
    package or too little memory; 130 for an interrupt; 141 if nobody reads the output any more."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name or an answer that the terminal cannot show
    try:
        try:
            return run_command(create_parser().parse_args(arguments))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("hydra: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        return READER_GONE


def run_command(options: argparse.Namespace) -> int:
    """Runs the verb that was parsed and returns the exit code of `main`."""
    try:
        with sigterm_as_exit():
            print_results(options)
        return 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError, StrictDataclassError) as error:
        message = describe_error(error)
    except ImportError as error:
        message = describe_missing_package(error)
        if message is None:
            raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ways = ", ".join(way for name, way in LESS_MEMORY.items() if hasattr(options, name))
        message = f"out of memory; to use less, try: {ways}"
    print(f"hydra {options.command}: {message}", file=sys.stderr)
    return 2


def print_results(options: argparse.Namespace) -> None:
    """Runs the verb. With `--json` its results are all that is printed on stdout, one a line; everything else is on stderr."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        results = options.run(options)
        for result in results if isinstance(results, Iterator) else (results,):
            if options.json and result is not None:
                finite = loads(dumps(result), parse_constant=lambda name: None)  # NaN and Infinity are not JSON
                print(dumps(finite), file=stdout, flush=True)


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM ends the command with SystemExit, so that files being written are removed."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def describe_error(error: Exception) -> str:
    """An error as one line; one of the file system begins with the file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def describe_missing_package(error: ImportError) -> str | None:
    """What to install, in one line; None if the error is not that a package is missing."""
    from importlib.metadata import requires

    if "hydra_hf[" in str(error):
        return describe_error(error)
    if not isinstance(error, ModuleNotFoundError) or (error.name or "hydra_hf").startswith("hydra_hf"):
        return None
    package = error.name.partition(".")[0]
    extras = [line.split('"')[-2] for line in requires("hydra_hf") or () if re.match(rf"{package}\b.*extra == ", line)]
    return f"the package {package} is not installed" + (f": pip install hydra_hf[{extras[0]}]" if extras else "")


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an accelerator or the CPU is out of memory; for the CPU, torch has no class of error."""
    import torch

    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in ("DefaultCPUAllocator", "out of memory"))


def create_parser() -> argparse.ArgumentParser:
    from hydra_hf.version import __version__

    parser = Parser(
        prog="hydra",
        description="HYDRA: one model that sees, answers and draws. hydra COMMAND --help says more.",
        formatter_class=partial(Formatter, max_help_position=22),
    )
    parser.set_defaults(json=False)
    parser.add_argument("--version", action="version", version=__version__, help="print it")
    parser.add_argument(
        "--completion", action=PrintCompletion, help="print what makes bash, zsh, tcsh, ... complete commands"
    )
    parser._positionals.title = parser._optionals.title = None  # all of it on one screen
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb in VERBS:
        summary, _, example = verb.__doc__.strip().partition("\n\nexample: ")
        headline = summary.partition("\n")[0].rstrip(".")
        command = commands.add_parser(
            verb.__name__.rpartition(".")[-1],
            help=f"{headline[0].lower()}{headline[1:]}",
            description=summary,
            epilog=f"example: {example}",
        )
        command.set_defaults(run=verb.run)
        verb.add_options(command)
    return parser
