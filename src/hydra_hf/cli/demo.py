"""Serve a page in the browser for a model, or write it as a Space folder.

example: hydra demo --port 7860
"""

import argparse
from pathlib import Path

from .common import add_model, load_pipeline


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", help="127.0.0.1 by default; 0.0.0.0 opens the page to the network")
    command.add_argument("--port", type=int, help="the first free one from 7860 by default")
    command.add_argument(
        "--space", type=Path, metavar="DIR", help="write a folder that can be uploaded as a Space, and serve nothing"
    )
    add_model(command, "--model")


def run(options: argparse.Namespace) -> None:
    if options.space is not None:
        from hydra_hf.demo.space import write_space

        write_space(options.space, options.model)
        print(
            f"{options.space}: python {options.space / 'app.py'} serves it; hf upload NAME {options.space} --repo-type space"
        )
        return
    from hydra_hf.demo.page import launch

    launch(load_pipeline(options), options.model, options.host, options.port)
