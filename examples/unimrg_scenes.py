"""Rendered 3D scenes with the exact depth and the exact boundaries of their objects, for UniMRG without any other model.

pip install "hydra_hf[scenes3d]"
python examples/unimrg_scenes.py --num_scenes 200 --out scenes
hydra train unimrg... --data depth=scenes/images,targets=scenes/depth --data segment=scenes/images,targets=scenes/segment

`scenes` has the folders images, depth and segment, as `hydra prepare unimrg` makes them, and scenes.jsonl with each object's
name, its distance and the share of the image that it covers.
"""

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hydra_hf.data.prepare_targets import write_sheet
from hydra_hf.data.targets import draw_boundaries
from hydra_hf.files import write_file, write_text


OBJECTS = {  # name -> file of pybullet_data, scale, and turn about the x axis that sets it on its feet
    "duck": ("duck_vhacd.urdf", 7, math.pi / 2), "teddy bear": ("teddy_vhacd.urdf", 6, math.pi / 2),
    "robot": ("r2d2.urdf", 0.7, 0), "brick": ("lego/lego.urdf", 9, 0), "football": ("soccerball.urdf", 0.6, 0),
    "ball": ("sphere2red.urdf", 0.6, 0), "mug": ("objects/mug.urdf", 5, 0), "table": ("table/table.urdf", 0.4, 0),
    "car": ("racecar/racecar.urdf", 1.2, 0), "domino": ("domino/domino.urdf", 7, 0), "tray": ("tray/tray.urdf", 0.8, 0),
    "cube": ("cube_small.urdf", 9, 0),
}  # fmt: skip
PLACES = [(x, y) for x in (-0.8, 0, 0.8) for y in (-0.8, 0, 0.8)]
NEAR, FAR = 0.1, 12.0  # metres: what the camera sees


@dataclass(frozen=True)
class Scene:
    levels: np.ndarray  # (H, W, 3) from 0 to 255
    distances: np.ndarray  # (H, W) in metres, along the direction of view
    bodies: np.ndarray  # (H, W) number of the body that a pixel shows
    names: dict[int, str]  # of the bodies that are objects
    view: np.ndarray  # (4, 4) from the world's coordinates to the camera's, which looks along -z


def connect() -> None:
    """Starts a simulation without a window, which finds the files of objects."""
    import pybullet
    import pybullet_data

    pybullet.connect(pybullet.DIRECT)
    pybullet.setAdditionalSearchPath(pybullet_data.getDataPath())


def render(rng: random.Random, width: int, height: int) -> Scene:
    """Two to five objects on a floor, from a random side."""
    import pybullet

    pybullet.resetSimulation()
    floor = pybullet.loadURDF("plane.urdf")
    if rng.random() < 0.5:  # otherwise a chequered floor
        pybullet.changeVisualShape(
            floor, -1, textureUniqueId=-1, rgbaColor=[*(rng.uniform(0.3, 1) for _ in range(3)), 1]
        )
    names = {}
    for name, place in zip(rng.sample(sorted(OBJECTS), rng.randint(2, 5)), rng.sample(PLACES, 5)):
        file, scale, turn = OBJECTS[name]
        rotation = pybullet.getQuaternionFromEuler([turn, 0, rng.uniform(0, 2 * math.pi)])
        body = pybullet.loadURDF(file, [*place, 0.5], rotation, globalScaling=scale * rng.uniform(0.8, 1.2))
        links = range(-1, pybullet.getNumJoints(body))
        lowest = min(pybullet.getAABB(body, link)[0][2] for link in links)
        pybullet.resetBasePositionAndOrientation(body, [*place, 0.5 - lowest], rotation)
        names[body] = name
    angle, lift = rng.uniform(0, 2 * math.pi), rng.uniform(1.0, 2.2)
    eye = [2.6 * math.cos(angle), 2.6 * math.sin(angle), lift]
    view = pybullet.computeViewMatrix(eye, [0, 0, 0.25], [0, 0, 1])
    lens = pybullet.computeProjectionMatrixFOV(50, width / height, NEAR, FAR)
    light = [rng.uniform(-2, 2), rng.uniform(-2, 2), 3]
    _, _, levels, depth, bodies = pybullet.getCameraImage(
        width, height, view, lens, lightDirection=light, renderer=pybullet.ER_TINY_RENDERER
    )
    levels, depth, bodies = (np.reshape(values, (height, width, -1)) for values in (levels, depth, bodies))
    distances = FAR * NEAR / (FAR - (FAR - NEAR) * depth[..., 0])  # from OpenGL's depth buffer
    return Scene(levels[..., :3].astype(np.uint8), distances, bodies[..., 0], names, np.reshape(view, (4, 4)).T)


def nearness(distances: np.ndarray) -> Image.Image:
    """1 / distance from black to white, as Depth-Anything's relative depth."""
    inverse = 1 / distances
    levels = (inverse - inverse.min()) / (inverse.max() - inverse.min()) * 255
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_scenes", type=int, default=200)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--height", type=int, default=448)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("scenes"))
    options = parser.parse_args()
    connect()
    records, paths = [], []
    for number in range(options.num_scenes):
        rng = random.Random(f"{options.seed} {number}")
        scene = render(rng, options.width, options.height)
        masks = {name: scene.bodies == body for body, name in scene.names.items()}
        pictures = {
            "images": Image.fromarray(scene.levels),
            "depth": nearness(scene.distances),
            "segment": draw_boundaries(map(torch.from_numpy, masks.values()), options.height, options.width, "cpu"),
        }
        path = f"{number:05d}.png"
        for name, picture in pictures.items():
            write_file(options.out / name / path, picture.save)
        objects = [
            {
                "name": name,
                "distance": round(float(np.median(scene.distances[mask])), 3),
                "share": round(float(mask.mean()), 4),
            }
            for name, mask in masks.items()
            if mask.any()
        ]
        records.append({"file_name": path, "objects": objects})
        paths.append(path)
    write_text(options.out / "scenes.jsonl", "\n".join(map(json.dumps, records)) + "\n")
    write_sheet(options.out, options.out / "images", paths, ["depth", "segment"])
    print(f"{options.out}: {options.num_scenes} scenes, see sheet.png")


if __name__ == "__main__":
    main()
