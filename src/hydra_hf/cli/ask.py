"""Ask a question about an image.

example: hydra ask cat.png "what is in the picture?"
"""

import argparse
from pathlib import Path

from .common import add_model, load_pipeline, open_image, print_unknown_words


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", type=Path)
    command.add_argument("question")
    add_model(command, "--model")


def run(options: argparse.Namespace) -> None:
    from hydra_hf.pipelines.answering import answer

    image = open_image(options.image)
    pipeline = load_pipeline(options)
    print_unknown_words(pipeline.processor, options.question)
    print(answer(pipeline.model, pipeline.processor, [image], [options.question])[0])
