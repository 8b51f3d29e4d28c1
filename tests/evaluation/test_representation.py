"""CKNNA against its equations, and the features that it compares."""

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_hf.evaluation import representation
from hydra_hf.evaluation.representation import cknna, layer_features, patch_mean, write_tsne
from hydra_hf.modeling import HydraTokModel
from tiny_models import make_tok_config


def features(number: int = 40, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def by_the_equations(first: np.ndarray, second: np.ndarray, k: int) -> float:
    """HYDRA, eq. 12-17, pair by pair."""
    kernels = [values @ values.T for values in (first, second)]
    neighbors = [
        [set(sorted(set(range(len(kernel))) - {i}, key=lambda j: -kernel[i, j])[:k]) for i in range(len(kernel))]
        for kernel in kernels
    ]
    centred = [kernel - kernel.mean(axis=1, keepdims=True) for kernel in kernels]

    def align(a: int, b: int) -> float:
        return sum(
            centred[a][i, j] * centred[b][i, j]
            for i in range(len(first)) for j in neighbors[a][i] & neighbors[b][i]
        )  # fmt: skip

    return align(0, 1) / (align(0, 0) * align(1, 1)) ** 0.5


def test_cknna_is_that_of_the_equations():
    first, second = features(), torch.cat([features()[:, :3], features(width=2, seed=1)], dim=1)
    unit = [(x / x.norm(dim=1, keepdim=True)).double().numpy() for x in (first, second)]
    expected = by_the_equations(*unit, k=5)
    assert 0.05 < expected < 0.95
    assert cknna(first, second, num_neighbors=5) == pytest.approx(expected, abs=1e-6)


def test_features_that_are_turned_and_scaled_are_aligned_with_themselves():
    turn = torch.linalg.qr(features(6, seed=2)).Q
    assert cknna(features(), 3 * features() @ turn) == pytest.approx(1, abs=1e-5)


def test_features_of_other_inputs_are_not_aligned():
    related = features(200) + 0.2 * features(200, seed=1)
    assert cknna(features(200), related) > 0.5
    assert cknna(features(200), features(200, seed=1)) < 0.1
    assert cknna(features(200), related.roll(1, dims=0)) < 0.1


def test_a_kernel_may_come_in_chunks(monkeypatch):
    whole = cknna(features(), features(seed=1))
    monkeypatch.setattr(representation, "CHUNK", 7)
    assert cknna(features(), features(seed=1)) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("second", "num_neighbors", "message"),
    [
        (features(39), 10, r"\(40, 6\) and \(39, 6\)"),
        (features(), 40, "num_neighbors=40 must be at least 1 and below the 40 inputs"),
        (features() / 0, 10, "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(second, num_neighbors, message):
    with pytest.raises(ValueError, match=message):
        cknna(features(), second, num_neighbors)


@pytest.fixture(scope="module")
def tower() -> HydraTokModel:
    torch.manual_seed(0)
    return HydraTokModel(make_tok_config()).eval()


def test_layers_are_those_of_gen_vit_and_then_of_sem_vit(tower):
    pixel_values = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = layer_features(tower, pixel_values)
    assert list(found) == ["layer_1", "layer_2", "layer_3", "generation", "understanding"]  # 1 | 2 layers
    with torch.no_grad():
        states = tower.gen_vit(tower.normalize_pixels(pixel_values))
        torch.testing.assert_close(found["layer_1"], states.mean(dim=1))
        torch.testing.assert_close(found["generation"], tower.bottleneck(states).mean.mean(dim=1))
        torch.testing.assert_close(found["understanding"], tower(pixel_values).last_hidden_state.mean(dim=1))


def test_class_tokens_do_not_count():
    states = torch.cat([torch.full((1, 1, 4), 100.0), torch.ones(1, 3, 4)], dim=1)
    assert patch_mean(states, 3).tolist() == [[1.0] * 4]


def test_a_map_is_drawn_the_same_way_again(tmp_path):
    pytest.importorskip("sklearn")
    labels = ["cat", "dog"] * 10
    for name in ("first.png", "second.png"):
        write_tsne(tmp_path / name, {"generation": features(20), "understanding": features(20, seed=1)}, labels)
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("first.png", "second.png"))
    assert first.shape[1] > 2 * first.shape[0]  # two maps side by side
    assert (first == second).all()
