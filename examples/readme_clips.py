"""Makes docs/clips.png and docs/edits.png, the README's pictures: clips that a model of HYDRA-X draws, and what it edits.

python examples/readme_clips.py runs/tiny_x.hydra/final
"""

import sys
from pathlib import Path

import torch

from hydra_hf import HydraPipeline
from hydra_hf.toy.evaluation_x import draw_clips
from hydra_hf.toy.pictures import write_clip_strips, write_edit_rows


CAPTIONS = [
    "a cat moves to the right",
    "a rocket right of a moon moves up",
    "a red circle moves down, then a dog moves up",
]
EDITS = {  # what is drawn first, and what is done with it
    "a dog left of a car": "remove the dog",
    "a red circle and an apple": "make the circle blue",
    "a cat above a star": "replace the cat with a rocket",
    "a fish": "move the fish to the top left",
    "a banana": "add a tree in the bottom right",
}


def main(model: str) -> None:
    docs = Path(__file__).parents[1] / "docs"
    pipeline, generator = HydraPipeline.from_pretrained(model), torch.Generator().manual_seed(0)
    write_clip_strips(docs / "clips.png", list(draw_clips(pipeline, CAPTIONS, generator)))
    sources = pipeline(list(EDITS), generator=generator).images
    results = pipeline(list(EDITS.values()), image=sources, generator=generator, output_type="pt").images
    shown = pipeline.image_processor.preprocess(sources)
    write_edit_rows(docs / "edits.png", shown, list(EDITS.values()), results.cpu() * 2 - 1)


if __name__ == "__main__":
    main(sys.argv[1])
