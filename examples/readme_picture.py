"""Makes docs/hydra-tiny.png, the README's picture: what the embedded checkpoint draws, rebuilds and answers.

python examples/readme_picture.py
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

import hydra_hf
from hydra_hf import HydraPipeline, HydraReconstructionPipeline
from hydra_hf.pipelines.answering import answer


DRAWN = ["a cat", "a red circle", "three strawberries", "a dog left of a car", "a rocket above a moon", "a blue square and a yellow triangle"]  # fmt: skip
ASKED = [
    "what is in the picture?", "what color is the circle?", "how many strawberries are there?", "is the dog left or right of the car?",
    "is the rocket above or below the moon?", "is there a yellow triangle?",
]  # fmt: skip
TILE, GAP, LINE = 192, 12, 18


def main() -> None:
    pipeline = HydraPipeline.from_pretrained(hydra_hf.TINY)
    drawn = pipeline(DRAWN, generator=torch.Generator().manual_seed(0)).images
    rebuild = HydraReconstructionPipeline(
        vision_tower=pipeline.model.model.vision_tower, image_processor=pipeline.processor.image_processor
    )
    rebuilt = rebuild(drawn, generator=torch.Generator().manual_seed(0)).images
    answers = answer(pipeline.model, pipeline.processor, drawn, ASKED)
    height = 2 * TILE + 3 * LINE + 5 * GAP
    sheet = Image.new("RGB", (len(DRAWN) * (TILE + GAP) + GAP, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (prompt, question, reply) in enumerate(zip(DRAWN, ASKED, answers)):
        left, top = GAP + column * (TILE + GAP), GAP
        for text, picture in ((f'"{prompt}"', drawn[column]), ("rebuilt by HYDRA-TOK", rebuilt[column])):
            pen.text((left, top), text, fill="black")
            sheet.paste(picture.resize((TILE, TILE), Image.Resampling.NEAREST), (left, top + LINE))
            top += LINE + TILE + GAP
        pen.text((left, top), f"{question}\n-> {reply}", fill="black")
    path = Path(__file__).parents[1] / "docs" / "hydra-tiny.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)


if __name__ == "__main__":
    main()
