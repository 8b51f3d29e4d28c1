"""What the verbs of the command line share: the model and its device, seeds, images in and out."""

import argparse
import sys
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile


DTYPES = ("auto", "float32", "bfloat16", "float16")
SHOWN_LINES = 16  # of the terminal, that a picture fills


def add_model(command: argparse.ArgumentParser, name: str, **kwargs) -> None:
    from hydra_hf import TINY

    command.add_argument(name, default=TINY, help="folder or Hub id; the embedded checkpoint by default", **kwargs)
    add_device(command)
    command.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="type of the weights; auto is the checkpoint's own"
    )


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        default="auto",
        help="such as cpu, cuda, cuda:1, mps or xpu; auto is the accelerator if there is one",
    )


def add_seed(command: argparse.ArgumentParser, help_text: str | None = None) -> None:
    command.add_argument("--seed", type=_seed, default=0, help=help_text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed, expected an integer from 0 to 2**63 - 1")
    return int(text)


def choose_device(name: str):
    """The torch.device of this name. Raises ValueError if this machine does not have it."""
    import torch

    counts, default = {"cpu": 1}, torch.device("cpu")
    if torch.accelerator.is_available():
        default = torch.accelerator.current_accelerator()
        counts[default.type] = torch.accelerator.device_count()
    if name == "auto":
        return default
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        available = [f"{kind}:{index}" for kind, count in counts.items() if kind != "cpu" for index in range(count)]
        raise ValueError(f"Got --device {name}, expected one of {', '.join(['auto', 'cpu', *available])}.")
    return device


def use_device(name: str) -> None:
    """Passes the device on to accelerate. Raises ValueError if this machine does not have it."""
    import os

    device = choose_device(name)
    if name != "auto":
        os.environ["ACCELERATE_USE_CPU"] = str(device.type == "cpu").lower()
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)


def load_pipeline(options: argparse.Namespace):
    """The pipeline `options.model` on its device, with progress bars on a terminal. Raises ValueError if it cannot be loaded."""
    from hydra_hf import TINY
    from hydra_hf.hub import check_model_name

    check_model_name(options.model)  # before the import of torch

    import diffusers
    import torch
    import transformers

    from hydra_hf import HydraPipeline

    device = choose_device(options.device)
    if options.model == TINY or not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = HydraPipeline.from_pretrained(options.model)
    except Exception as error:  # three libraries read the files, which may contain anything
        missing = "" if Path(options.model).is_dir() else "; there is no folder of this name either"
        reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"The model {options.model} cannot be loaded: {reason}{missing}") from error
    pipeline.set_progress_bar_config(disable=None, leave=False)  # None is tqdm's "on a terminal"
    return pipeline.to(device) if options.dtype == "auto" else pipeline.to(device, getattr(torch, options.dtype))


def load_vision_tower(options: argparse.Namespace):
    """The tokenizer of the model `options.model`, which may be one alone, on its device. Raises ValueError as `load_pipeline`."""
    import torch
    from transformers import PreTrainedConfig

    from hydra_hf import HydraTokModel

    try:
        config, _ = PreTrainedConfig.get_config_dict(options.model)
    except OSError:  # a pipeline has its configs in its parts
        config = {}
    if config.get("model_type") != HydraTokModel.config_class.model_type:
        return load_pipeline(options).model.model.vision_tower
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    return HydraTokModel.from_pretrained(options.model, dtype=dtype).to(choose_device(options.device))


def print_unknown_words(processor, text: str) -> None:
    """Prints one line on stderr if the model of a small world has never read some words of `text`."""
    if words := processor.unknown_words(text):
        print(f"words that this model does not know: {', '.join(words)}", file=sys.stderr)


def check_readable(path: Path) -> None:
    """Checks a file before the long part. Raises OSError if it cannot be read."""
    with path.open("rb"):
        pass


def open_image(path: Path):
    """The image in the file `path`. Raises OSError or ValueError if it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError) and error.errno is not None:
            raise  # the file system, not the image
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    return image


def check_out(path: Path) -> None:
    """Checks `--out` before the long part. Raises ValueError if the file cannot be written."""
    if path.exists() and not path.is_file():
        raise ValueError(
            f"--out {path} is {'a folder' if path.is_dir() else 'not a regular file'}, expected a file to write."
        )
    folder = _nearest_folder(path)
    try:
        with NamedTemporaryFile(dir=folder, prefix=path.stem, suffix=path.suffix):
            pass
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}.") from error


def check_out_folder(path: Path) -> None:
    """Checks `--out` before the long part. Raises ValueError if the folder cannot be written to."""
    folder = path if path.is_dir() else _nearest_folder(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path} is a file, expected a folder.")
    try:
        with NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}.") from error


def _nearest_folder(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"--out {path} cannot be written: {folder} is not a folder.")
    return folder


def check_image_out(path: Path) -> None:
    """`check_out`, and ValueError if Pillow cannot write the format."""
    from PIL import Image

    try:
        Image.new("RGB", (16, 16)).save(BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"--out {path} cannot be written: {path.suffix!r} is not an image format that can be written, expected .png or .jpg."
        ) from error
    check_out(path)


CLIPS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp")  # the last two only with several frames
WRITABLE_CLIPS = (".mp4", ".gif", ".webp")


def open_visual(path: Path, processor):
    """The image in the file `path`, or the path itself for a clip, if the model reads clips.

    Raises OSError or ValueError if it cannot be read.
    """
    suffix, is_clip = path.suffix.lower(), False
    if suffix in CLIPS and path.is_file():
        is_clip = suffix not in (".gif", ".webp") or open_image(path).n_frames > 1
    if not is_clip:
        return open_image(path)
    if processor.video_token is None:
        raise ValueError(f"{path} is a clip, but this model reads images alone.")
    return str(path)


def check_clip_out(path: Path) -> None:
    """`check_out`, and ValueError for a file that is not a clip's."""
    if path.suffix.lower() not in WRITABLE_CLIPS:
        raise ValueError(
            f"--out {path} cannot be written: {path.suffix!r} is not the ending of a clip, expected one of"
            f" {', '.join(WRITABLE_CLIPS)}."
        )
    check_out(path)


def add_fps(command: argparse.ArgumentParser) -> None:
    command.add_argument("--fps", type=float, default=8.0, help="frames a second of a clip that is written")


def save_image(image, path: Path) -> None:
    """Writes an image completely or not at all."""
    from hydra_hf.files import write_file

    write_file(path, image.save)


def show_image(image) -> None:
    """Shows a picture on a terminal that can, by sixels or kitty's protocol, if hydra_hf[cli] is installed; else nothing."""
    is_terminal = sys.stdin.isatty() and sys.stdout is sys.__stdout__ and sys.stdout.isatty()
    if not is_terminal or find_spec("textual_image") is None:
        return
    from rich.console import Console
    from textual_image.renderable import Image, SixelImage, TGPImage  # asks the terminal what it can

    if Image in (SixelImage, TGPImage):
        Console().print(Image(image, width="auto", height=min(SHOWN_LINES, Console().height - 2)))
