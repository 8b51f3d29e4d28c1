"""Ask a question about an image or a clip.

example: hydra ask cat.png "what is in the picture?"
"""

import argparse
from pathlib import Path

from .common import add_model, check_readable, load_pipeline, open_visual, print_unknown_words


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", type=Path, help="an image, or a clip such as .mp4")
    command.add_argument("question")
    add_model(command, "--model")


def run(options: argparse.Namespace) -> dict:
    check_readable(options.image)
    from hydra_hf.pipelines.answering import answer

    pipeline = load_pipeline(options)
    image = open_visual(options.image, pipeline.processor)
    print_unknown_words(pipeline.processor, options.question)
    (text,) = answer(pipeline.model, pipeline.processor, [image], [options.question])
    print(text)
    return {"answer": text}
