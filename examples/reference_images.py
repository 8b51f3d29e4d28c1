"""Makes docs/images/ and docs/tables/reference_images.md: what the embedded checkpoint draws from prompts and seeds.

python examples/reference_images.py
"""

from pathlib import Path

import torch
from PIL import Image

import hydra_hf
from hydra_hf import HydraPipeline
from hydra_hf.pipelines.answering import answer


DOCS = Path(__file__).parents[1] / "docs"
QUESTION = "what is in the picture?"
DRAWN = (  # prompt, seed, height, width
    ("a cat", 0, 64, 64), ("a cat", 1, 64, 64), ("a cat", 2, 64, 64), ("two apples", 0, 64, 64),
    ("three strawberries", 1, 64, 64), ("a red circle", 0, 64, 64), ("a blue square and a yellow triangle", 0, 64, 64),
    ("a dog left of a car", 3, 64, 64), ("a rocket above a moon", 0, 64, 64), ("a cat", 0, 48, 48),
    ("a dog left of a car", 0, 64, 128), ("a rocket above a moon", 0, 128, 64),
)  # fmt: skip


def draw(pipeline: HydraPipeline, prompt: str, seed: int, height: int, width: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, height=height, width=width, generator=generator).images[0]


def file_name(prompt: str, seed: int, height: int, width: int) -> str:
    return f"{prompt.replace(' ', '_')}-{seed}-{height}x{width}.png"


def main() -> None:
    pipeline = HydraPipeline.from_pretrained(hydra_hf.TINY)
    images = [draw(pipeline, *row) for row in DRAWN]
    answers = answer(pipeline.model, pipeline.processor, images, [QUESTION] * len(images))
    (DOCS / "images").mkdir(exist_ok=True)
    table = f"| command | picture | {QUESTION} |\n|---|---|---|\n"
    for (prompt, seed, height, width), image, reply in zip(DRAWN, images, answers):
        name = file_name(prompt, seed, height, width)
        image.save(DOCS / "images" / name)
        size = "" if height == width == 64 else f" --height {height} --width {width}"
        command = f'hydra generate "{prompt}" --seed {seed}{size} --out drawn.png'
        table += f'| `{command}` | ![{prompt}](docs/images/{name}){{ width="{2 * width}" }} | {reply} |\n'
    (DOCS / "tables" / "reference_images.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
