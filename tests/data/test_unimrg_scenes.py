"""Rendered scenes: what `examples/unimrg_scenes.py` writes is exact, and is what training reads."""

import json
import random
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydra_hf.data.readers import TaskReader
from hydra_hf.data.sources import parse_source


pybullet = pytest.importorskip("pybullet", reason="pip install hydra_hf[scenes3d]")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def example():
    spec = spec_from_file_location("unimrg_scenes", Path(__file__).parents[2] / "examples" / "unimrg_scenes.py")
    module = sys.modules["unimrg_scenes"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pixel_of_an_object_is_as_far_as_the_object_is(example):
    example.connect()
    num_objects = 0
    for seed in range(4):
        scene = example.render(random.Random(seed), 96, 64)
        for body in scene.names:
            if not (mask := scene.bodies == body).any():
                continue
            links = range(-1, pybullet.getNumJoints(body))
            boxes = np.array([pybullet.getAABB(body, link) for link in links])
            box = np.stack([boxes[:, 0].min(0), boxes[:, 1].max(0)])
            corners = np.array(
                [[*(box[i, axis] for axis, i in enumerate(choice)), 1] for choice in product((0, 1), repeat=3)]
            )
            distances = -(scene.view @ corners.T)[2]
            assert distances.min() - 0.1 < scene.distances[mask].min()
            assert scene.distances[mask].max() < distances.max() + 0.1
            num_objects += 1
    assert num_objects > 6


def test_scenes_are_written_as_training_reads_them(example, tmp_path, monkeypatch, tiny_processor):
    out = tmp_path / "scenes"
    monkeypatch.setattr(sys, "argv", ["", "--num_scenes", "3", "--width", "96", "--height", "64", "--out", str(out)])
    example.main()
    records = [json.loads(line) for line in (out / "scenes.jsonl").read_text().splitlines()]
    assert [record["file_name"] for record in records] == [f"0000{number}.png" for number in range(3)]
    for record in records:
        lines = np.asarray(Image.open(out / "segment" / record["file_name"]))[..., 0] == 255
        assert 0 < lines.mean() < 0.2
        assert np.asarray(Image.open(out / "depth" / record["file_name"])).max() == 255
    for task in ("depth", "segment"):
        source = parse_source(f"{task}={out}/images,targets={out}/{task}")
        reader = TaskReader((source,), tiny_processor, 0, max_length=200)
        assert all(reader[number].messages[1]["content"][0]["image"].max() == 1 for number in range(3))
