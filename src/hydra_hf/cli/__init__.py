"""hydra generate | ask | reconstruct | prepare | train | evaluate | convert: a file for each verb."""

import argparse
import io
import sys
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

from . import ask, convert, evaluate, generate, prepare, reconstruct, train


VERBS = (generate, ask, reconstruct, prepare, train, evaluate, convert)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. A wrong argument, file or config is one line on stderr and exit code 2, an interrupt 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name or an answer that the terminal cannot show
    options = create_parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"hydra {options.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"hydra {options.command}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


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
