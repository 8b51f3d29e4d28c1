"""The parser of the command line: help on one screen, errors of one line, completion for shells."""

import argparse
import math
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Commands are listed right under their title."""

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if action.nargs == argparse.PARSER else text


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all options. Each parser, of a command too, takes `--json`."""

    add_late_options: Callable[[list[str]], None] | None = None  # those that depend on the arguments

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": Formatter, "add_help": False, **kwargs})
        self.register("type", int, read_integer)
        self.register("type", float, read_number)
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS,  # a command must not undo `hydra --json COMMAND`
            help="print the result as JSON on stdout, all else on stderr",
        )  # fmt: skip

    def parse_known_args(self, args=None, namespace=None):
        """Refuses unknown options where their command is known, with the nearest option that there is."""
        if self.add_late_options is not None:
            self.add_late_options(args)
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            nearest = get_close_matches(unknown[0].partition("=")[0], names, n=1)
            self.error(f"unexpected {unknown[0]!r}" + (f", did you mean {nearest[0]}?" if nearest else ""))
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def read_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer") from None


def read_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number")
    return number


class PrintCompletion(argparse.Action):
    """Prints the completion script of a shell."""

    def __init__(self, **kwargs):
        super().__init__(metavar="SHELL", default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, shell, option_string=None):
        try:
            import shtab
        except ImportError:
            parser.error(f"{option_string} needs shtab: pip install hydra_hf[cli]")
        if shell not in shtab.SUPPORTED_SHELLS:
            parser.error(f"{option_string} {shell} is not one of {', '.join(shtab.SUPPORTED_SHELLS)}")
        _prepare_completion(parser)
        print(shtab.complete(parser, shell))
        parser.exit()


def _prepare_completion(parser: Parser) -> None:
    """Adds what depends on arguments, and marks every argument that is a path as one that shells complete; of commands, too."""
    import shtab

    for action in parser._actions:
        if parser.add_late_options is not None and not action.option_strings:
            parser.add_late_options(list(action.choices))
        if action.type is Path:
            action.complete = shtab.FILE
        if action.nargs == argparse.PARSER:
            for command in action.choices.values():
                _prepare_completion(command)
