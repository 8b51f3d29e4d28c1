"""What the verbs of the command line share: the model, pictures in and out."""

import argparse
from pathlib import Path


def add_model(command: argparse.ArgumentParser, name: str, **kwargs) -> None:
    from hydra_hf import TINY

    command.add_argument(name, default=TINY, help="folder or Hub id; the embedded checkpoint by default", **kwargs)


def load_pipeline(model: str):
    """The pipeline in a folder or on the Hub, without bars; ValueError says what is wrong with it."""
    import diffusers
    import transformers
    from safetensors import SafetensorError

    from hydra_hf import HydraPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        return HydraPipeline.from_pretrained(model)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: weights that do not fit their config
        raise ValueError(f"The model {model} cannot be loaded: {error}") from error


def tell_unknown_words(processor, text: str) -> None:
    """One line on stderr if the model of a small world has never read some words of `text`."""
    import sys

    if words := processor.unknown_words(text):
        print(f"words that this model does not know: {', '.join(words)}", file=sys.stderr)


def open_image(path: Path):
    """A picture; OSError or ValueError says what is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError) and error.errno is not None:
            raise  # the file system, not the picture
        raise ValueError(f"{path} is not a picture that can be read: {error}") from error
    return image


def check_ending(path: Path) -> None:
    """Before the long part. Raises ValueError for a format that Pillow does not write."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} cannot be written: {path.suffix!r} is no format of pictures, expected .png or .jpg.")


def save_image(image, path: Path) -> None:
    """A picture, whole or not there."""
    from hydra_hf.files import write_file

    write_file(path, image.save)
