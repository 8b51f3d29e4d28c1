"""Put results of suites into the tables of the papers.

example: hydra report geneval.json mme.json --out report.md
"""

import argparse
from pathlib import Path

from .common import check_out


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("results", type=Path, nargs="+", help="JSON files of hydra evaluate")
    command.add_argument("--out", type=Path, help="a file for the report in Markdown; it is printed by default")


def run(options: argparse.Namespace) -> dict:
    from hydra_hf.evaluation.papers import report
    from hydra_hf.evaluation.report import SuiteResult
    from hydra_hf.files import write_text

    if options.out is not None:
        check_out(options.out)
    text = report(map(SuiteResult.load, options.results))
    if options.out is None:
        print(text, end="")
    else:
        write_text(options.out, text)
        print(options.out)
    return {"report": text}
