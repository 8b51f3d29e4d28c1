"""hydra generate | edit | ask | chat | reconstruct | serve | prepare | train | evaluate | convert: a file for each verb."""

import argparse
import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

from . import ask, chat, convert, edit, evaluate, generate, prepare, reconstruct, serve, train


VERBS = (generate, edit, ask, chat, reconstruct, serve, prepare, train, evaluate, convert)
LESS_MEMORY = {
    "micro_batch_size": "a lower --micro_batch_size",
    "gradient_checkpointing": "--gradient_checkpointing",
    "max_length": "a lower --max_length",
    "height": "a lower --height and --width",
    "image": "a smaller image",
    "dtype": "--dtype bfloat16",
}  # what helps, by the option that a verb has


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2, with one line on stderr, for a wrong argument, file or config or too
    little memory; 130 for an interrupt."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name or an answer that the terminal cannot show
    options = create_parser().parse_args(arguments)
    try:
        with sigterm_as_exit():
            options.run(options)
    except KeyboardInterrupt:
        print(f"hydra {options.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"hydra {options.command}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ways = ", ".join(way for name, way in LESS_MEMORY.items() if hasattr(options, name))
        print(f"hydra {options.command}: out of memory; to use less, try: {ways}", file=sys.stderr)
        return 2
    return 0


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


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an accelerator or the CPU is out of memory; for the CPU, torch has no class of error."""
    import torch

    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in ("DefaultCPUAllocator", "out of memory"))


def create_parser() -> argparse.ArgumentParser:
    from hydra_hf import __version__

    parser = Parser(prog="hydra", description="HYDRA: one model that sees, answers and draws.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[-1]
        summary, _, example = verb.__doc__.strip().partition("\n\nexample: ")
        summary = summary.rstrip(".")
        command = commands.add_parser(
            name, help=f"{summary[0].lower()}{summary[1:]}", description=f"{summary}.", epilog=f"example: {example}"
        )
        command.set_defaults(run=verb.run)
        verb.add_options(command)
    return parser
