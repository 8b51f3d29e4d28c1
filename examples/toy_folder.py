"""Writes images of the toy world as a folder of PNG files, in a folder for each first object, as benchmarks read them.

python examples/toy_folder.py runs/scenes --split test --max_objects 4
"""

import argparse
from pathlib import Path

import torch

from hydra_hf.files import write_image_grid
from hydra_hf.toy.world import MAX_OBJECTS, ToyWorld


def main(out: Path, number: int, split: str, max_objects: int, seed: int) -> None:
    world, generator = ToyWorld(difficulty=1), torch.Generator().manual_seed(seed)
    scenes = world.sample_scenes(number, generator, split=split, max_objects=max_objects, scattered=0.5)
    for index, (pixel_values, objects) in enumerate(zip(world.render(scenes), scenes.objects)):
        folder = out / world.names[objects[0]].replace(" ", "_")
        write_image_grid(folder / f"{index:05}.png", pixel_values[None], num_columns=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--split", choices=("train", "test"), default="test", help="test is held out")
    parser.add_argument("--max_objects", type=int, default=MAX_OBJECTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.out, options.number, options.split, options.max_objects, options.seed)
