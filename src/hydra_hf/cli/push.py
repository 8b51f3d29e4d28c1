"""Upload a model, adapters or data to the Hub, with a card.

example: hydra push runs/tiny.hydra/final OWNER/NAME --prompt "a cat" --private
"""

import argparse
from pathlib import Path

from .common import add_seed


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, help="folder of a pipeline, a model, adapters, data or a Space")
    command.add_argument("repo", help="OWNER/NAME; made if it is new")
    command.add_argument("--repo_type", choices=("model", "dataset", "space"), default="model")
    command.add_argument("--private", action="store_true", default=None, help="make a new repo private")
    command.add_argument("--revision", help="branch to push to, made from main if it is new")
    command.add_argument("--create_pr", action="store_true", help="open a pull request instead of writing to a branch")
    command.add_argument("--message", help="of the commit")
    command.add_argument(
        "--no_code", action="store_true", help="without the code for trust_remote_code: readers install hydra_hf"
    )
    command.add_argument(
        "--license", help="of the weights, such as apache-2.0; that of the card by default, else other"
    )
    command.add_argument("--base_model", help="Hub id of what it was trained from, or of what adapters are loaded on")
    command.add_argument("--prompt", action="append", default=[], help="draw an image for the card; may be repeated")
    add_seed(command, "of these images")


def run(options: argparse.Namespace) -> dict:
    from hydra_hf.publishing.push import push

    url = push(
        options.source,
        options.repo,
        repo_type=options.repo_type,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        message=options.message,
        code=not options.no_code,
        license=options.license,
        base_model=options.base_model,
        prompts=tuple(options.prompt),
        seed=options.seed,
    )
    print(url)
    return {"url": url}
