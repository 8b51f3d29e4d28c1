"""Measures of painted maps: the truth scores full, what says nothing scores low where it should."""

import pytest
import torch

from hydra_hf.evaluation import maps
from hydra_hf.toy.world import ToyWorld


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld(difficulty=1)


@pytest.fixture(scope="module")
def scenes(world):
    return world.sample_scenes(8, torch.Generator().manual_seed(0))


def test_the_truth_scores_full(world, scenes):
    depth, lines = world.render_depth(scenes), world.render_segmentation(scenes)
    foreground = maps.foreground_of(depth)
    assert maps.depth_similarity(depth, depth).eq(1).all()
    assert maps.foreground_error(depth, depth).eq(0).all()
    assert maps.intersection_over_union(foreground, foreground).eq(1).all()
    torch.testing.assert_close(maps.boundary_f(lines, lines), torch.ones(8))
    for index, masks in enumerate(world.object_masks(scenes)):
        present = masks.flatten(1).any(dim=1)
        right, pairs = maps.order_accuracy(depth[index], masks[present], scenes.distances[index][present])
        assert right == pairs


def test_black_is_similar_and_says_nothing(world, scenes):
    depth, lines = world.render_depth(scenes), world.render_segmentation(scenes)
    black = torch.full_like(depth, -1.0)
    assert maps.depth_similarity(black, depth).mean() > 0.6  # why the paper's measure is not enough
    assert maps.intersection_over_union(maps.foreground_of(black), maps.foreground_of(depth)).eq(0).all()
    assert maps.boundary_f(black, lines).eq(0).all()
    assert maps.white_share(black).eq(0).all()
    assert maps.white_share(lines).gt(0).all()


def test_empty_maps_agree():
    empty = torch.full((1, 3, 8, 8), -1.0)
    assert maps.boundary_f(empty, empty).item() == 1
    nothing = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert maps.intersection_over_union(nothing, nothing).item() == 1


@pytest.mark.parametrize(("shift", "score"), [(1, 1.0), (3, 0.0)])
def test_a_line_counts_within_the_tolerance(shift, score):
    truth = torch.full((1, 3, 16, 16), -1.0)
    truth[..., 8] = 1
    assert maps.boundary_f(truth.roll(shift, dims=-1), truth, tolerance=1).item() == pytest.approx(score)


def test_order_counts_pairs_at_different_distances():
    depth = torch.tensor([[-1.0, 0.0, 1.0]]).expand(3, 1, 3)  # the last is nearest
    objects = torch.eye(3, dtype=torch.bool)[:, None]
    assert maps.order_accuracy(depth, objects, torch.tensor([3.0, 2.0, 1.0])) == (3, 3)
    assert maps.order_accuracy(depth, objects, torch.tensor([1.0, 1.0, 3.0])) == (0, 2)
    assert maps.order_accuracy(depth, objects[:1], torch.tensor([1.0])) == (0, 0)


def test_each_object_has_its_own_mask(world, scenes):
    masks = world.object_masks(scenes)
    assert torch.equal(masks.flatten(2).any(dim=2), scenes.objects >= 0)
    assert torch.equal(masks.any(dim=1), world.render_depth(scenes)[:, 0] > -1)
