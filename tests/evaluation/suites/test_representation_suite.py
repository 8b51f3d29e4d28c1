"""The suite that compares features for generation and for understanding, and a tokenizer's layers with its teacher's."""

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_hf.evaluation.suites.representation import run
from hydra_hf.modeling import HydraTokModel
from tiny_models import make_tok_config


@pytest.fixture(scope="module")
def tower() -> HydraTokModel:
    torch.manual_seed(0)
    return HydraTokModel(make_tok_config()).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("cat", "dog", "fox"):
        (folder / name).mkdir()
        for index in range(6):
            image = Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8))
            image.save(folder / name / f"{index}.png")
    return folder


def test_a_layer_before_the_bottleneck_is_aligned_with_that_of_the_model_that_it_came_from(tower, images, tmp_path):
    tower.save_pretrained(tmp_path)
    result = run(tower, "tiny", data=images, teacher=str(tmp_path), num_neighbors=5)
    assert list(result.scores) == ["cknna", *(f"cknna_teacher/layer_{number}" for number in (1, 2, 3))]
    assert result.scores["cknna_teacher/layer_1"] == pytest.approx(1, abs=1e-5)  # the same weights, no bottleneck yet
    assert result.scores["cknna_teacher/layer_3"] < 0.999  # the teacher has none
    assert -1 <= result.scores["cknna"] < 0.999
    assert "18 images, not the 10000 of the paper." in result.notes


def test_the_map_shows_the_first_classes(tower, images, tmp_path):
    pytest.importorskip("sklearn")
    run(tower, "tiny", data=images, folder=tmp_path / "maps", num_classes=2, num_neighbors=5)
    assert np.asarray(Image.open(tmp_path / "maps" / "tsne.png")).std() > 1
