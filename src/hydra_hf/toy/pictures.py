"""Pictures of clips and edits for people: strips of frames, and edits with their instructions."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from hydra_hf.files import write_image_grid

from .clips import GROUP


SCALE = 3  # pixels of a picture for one of the world
LETTER, CHARACTERS = 18, 18  # pixels of a letter, and how many are in a line of a picture of 64 px


def write_clip_strips(path: Path, clips: Sequence[Tensor]) -> None:
    """A PNG with a row for each clip (3, T, H, W) in [-1, 1]: every fourth frame, the first and the last included."""
    frames = torch.stack([clip[:, ::GROUP] for clip in clips]).transpose(1, 2)
    write_image_grid(path, enlarge(frames.flatten(0, 1)), num_columns=frames.shape[1])


def write_edit_rows(path: Path, sources: Tensor, instructions: Sequence[str], results: Tensor) -> None:
    """A PNG with a row for each edit: its source, its instruction and its result; pictures are (B, 3, H, W) in [-1, 1]."""
    sources, results = enlarge(sources), enlarge(results)
    texts = torch.stack([write_words(text, *sources.shape[-2:]) for text in instructions])
    write_image_grid(path, torch.stack([sources, texts, results], dim=1).flatten(0, 1), num_columns=3)


def enlarge(pixel_values: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) of `SCALE` times the size, their pixels as squares."""
    return nn.functional.interpolate(pixel_values.float(), scale_factor=SCALE, mode="nearest")


def write_words(text: str, height: int, width: int) -> Tensor:
    """Text in the middle of a white picture (3, H, W) in [-1, 1]."""
    lines = wrap(text, max(1, CHARACTERS * width // (SCALE * 64)))
    picture = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(LETTER)
    middle = (width / 2, height / 2)
    ImageDraw.Draw(picture).multiline_text(middle, "\n".join(lines), "black", font, anchor="mm", align="center")
    return pil_to_tensor(picture).float() / 127.5 - 1
