"""The toy world: scenes, pictures and their truth, what is held out."""

import pytest
import torch

from hydra_hf.toy.world import (
    BACKGROUNDS,
    CANVAS,
    CANVASES,
    FAR,
    NEAR,
    PATCH,
    SPRITE,
    Scenes,
    ToyWorld,
    places_on,
    sprite_size,
)


@pytest.fixture(scope="module")
def world():
    return ToyWorld()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_object(world: ToyWorld, name: str, distance: float = NEAR, background: str = "white") -> Scenes:
    """`name` alone in the middle."""
    objects = torch.tensor([[world.names.index(name), -1, -1, -1]])
    positions = torch.tensor([[(16, 16), (0, 0), (0, 0), (0, 0)]])
    backgrounds = torch.tensor([list(BACKGROUNDS).index(background)])
    return Scenes(objects, positions, torch.full((1, 4), distance), torch.full((1, 4), SPRITE), backgrounds)


@pytest.mark.parametrize("difficulty", [0, 4, "1"])
def test_unknown_difficulty_is_an_error(difficulty):
    with pytest.raises(ValueError, match="difficulty"):
        ToyWorld(difficulty)


@pytest.mark.parametrize(("arguments", "message"), [({"split": "val"}, "split"), ({"max_objects": 5}, "max_objects")])
def test_wrong_sampling_argument_is_an_error(world, arguments, message):
    with pytest.raises(ValueError, match=message):
        world.sample_scenes(2, seeded(), **arguments)


@pytest.mark.parametrize(("difficulty", "num_names"), [(1, 48), (2, 72), (3, 72)])
def test_every_object_has_its_own_name_and_picture(difficulty, num_names):
    world = ToyWorld(difficulty)
    assert len(set(world.names)) == len(world.names) == len(world.sprites) == num_names
    distances = torch.cdist(world.sprites.flatten(1), world.sprites.flatten(1)).fill_diagonal_(torch.inf)
    assert distances.min() > 1.0


def test_equal_seeds_give_equal_pictures_and_the_global_generator_is_left_alone(world):
    before = torch.get_rng_state()
    first, second, third = (world.render(world.sample_scenes(8, seeded(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("canvas", [CANVAS, (48, 48), (128, 64), (48, 96), (112, 80)])
@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_pictures_are_in_range_and_objects_inside_the_canvas(difficulty, canvas):
    world = ToyWorld(difficulty)
    scenes = world.sample_scenes(64, seeded(), canvas=canvas, scattered=0.5)
    for draw in (world.render, world.render_depth, world.render_segmentation):
        pixel_values = draw(scenes)
        assert pixel_values.shape == (64, 3, *canvas)
        assert pixel_values.abs().max() <= 1 + 1e-5
    assert scenes.positions.min() >= 0
    ends = scenes.positions + scenes.sizes[..., None]
    assert ends[..., 0].max() <= canvas[1]
    assert ends[..., 1].max() <= canvas[0]


def test_canvases_are_all_of_48_to_128_px_in_whole_patches_from_1_to_2_to_2_to_1():
    sides = (48, 64, 80, 96, 112, 128)
    assert set(CANVASES) == {(h, w) for h in sides for w in sides if 0.5 <= h / w <= 2}
    assert CANVASES[0] == CANVAS == (64, 64)
    with pytest.raises(ValueError, match=r"canvas=\(64, 144\)"):
        ToyWorld().sample_scenes(1, seeded(), canvas=(64, 144))


def test_two_objects_fit_along_each_side_of_any_canvas_and_layouts_reach_its_edges():
    """In halves of the room, floored to a patch: on 80 x 112 px an object of 32 px is at x 0, 32 or 80, y 0, 16 or 48."""
    for canvas in CANVASES:
        assert min(canvas) >= 2 * sprite_size(canvas)
        places = places_on(canvas)
        assert (places % PATCH == 0).all()
        assert places[3, 3].tolist() == [canvas[1] - sprite_size(canvas), canvas[0] - sprite_size(canvas)]
    assert places_on(CANVAS)[0, 0].tolist() == [16, 16]
    assert places_on((80, 112))[[0, 1, 2], [0, 1, 2]].tolist() == [[32, 16], [80, 16], [32, 48]]
    assert [sprite_size(canvas) for canvas in (CANVAS, (48, 96), (128, 64))] == [32, 16, 32]


def test_a_small_object_is_the_large_one_at_half_the_size(world):
    large = world.sprites_of_size[SPRITE].unflatten(1, (16, 2)).unflatten(3, (16, 2)).mean((2, 4))
    assert torch.allclose(world.sprites_of_size[SPRITE // 2], large, atol=1e-6)


@pytest.mark.parametrize("scattered", [0.0, 0.5, 1.0])
def test_difficulty_one_stands_on_whole_patches_in_reading_order(world, scattered):
    scenes = world.sample_scenes(256, seeded(), scattered=scattered)
    assert (scenes.positions % 16 == 0).all()
    counts = (scenes.objects >= 0).sum(1)
    assert set(counts.tolist()) == {1, 2, 3, 4}
    order = scenes.positions[..., 1] * CANVAS[1] + scenes.positions[..., 0]
    for row, count in zip(order.tolist(), counts.tolist()):
        assert row[:count] == sorted(set(row[:count]))


def test_a_lone_object_stands_in_the_middle_and_anywhere_when_scattered(world):
    def places(**arguments):
        return {
            tuple(at) for at in world.sample_scenes(500, seeded(), max_objects=1, **arguments).positions[:, 0].tolist()
        }

    assert places() == {(16, 16)}
    assert places(scattered=1.0) == {(x, y) for x in (0, 16, 32) for y in (0, 16, 32)}


@pytest.mark.parametrize("difficulty", [1, 3])
def test_scattered_objects_do_not_cover_each_other(difficulty):
    scenes = ToyWorld(difficulty).sample_scenes(500, seeded(), scattered=1.0)
    for objects, positions, sizes in zip(scenes.objects, scenes.positions, scenes.sizes):
        places = positions[objects >= 0].float()
        gaps = (places[:, None] - places[None]).abs().amax(-1).fill_diagonal_(torch.inf)
        assert gaps.min() >= sizes[objects >= 0].min() - 8  # objects off the grid move by up to 4 px


def test_sprite_on_whole_patches_is_drawn_pixel_for_pixel(world):
    scenes = one_object(world, "cat")
    color, alpha = world.sprites[world.names.index("cat")].split([3, 1])
    expected = color + (1 - alpha) * 245 / 255
    drawn = (world.render(scenes)[0, :, 16:48, 16:48] + 1) / 2
    assert torch.allclose(drawn, expected, atol=1e-5)


def test_far_object_is_halfway_to_the_background(world):
    near, far = (world.render(one_object(world, "red circle", distance))[0] for distance in (NEAR, FAR))
    background = near[:, :1, :1]
    assert torch.allclose(far - background, (near - background) / 2, atol=1e-5)


def test_depth_is_the_nearness_of_the_object_at_each_pixel(world):
    scenes = one_object(world, "blue square")
    assert set(world.render_depth(scenes).unique().tolist()) == {-1.0, 1.0}
    far = world.render_depth(one_object(world, "blue square", FAR))
    assert set(far.unique().tolist()) == {-1.0, 0.0}
    red = (world.render(scenes)[0, 0] + 1) / 2 * 255  # 245 in the white background, 50 in the blue
    halfway = (245 + 50) / 2
    is_edge = (red - halfway).abs() < 1  # half covered: either side is right
    is_near = world.render_depth(scenes)[0, 0] > 0
    assert torch.equal(is_near[~is_edge], (red < halfway)[~is_edge])


def test_segmentation_is_the_closed_outline_of_what_depth_sees(world):
    scenes = world.sample_scenes(32, seeded())
    lines, solid = world.render_segmentation(scenes)[:, 0] > 0, world.render_depth(scenes)[:, 0] > -1
    assert set(world.render_segmentation(scenes).unique().tolist()) == {-1.0, 1.0}
    assert solid[lines].all()
    padded = torch.nn.functional.pad((~solid).float(), (1, 1, 1, 1))  # the frame of the canvas is no boundary
    beside_background = torch.nn.functional.max_pool2d(padded[:, None], 3, stride=1)[:, 0] > 0
    assert lines[solid & beside_background].all()
    interior = solid & ~lines
    assert interior.sum() > lines.sum()


def test_no_training_scene_holds_a_pair_or_count_of_the_test_split(world):
    scenes = world.sample_scenes(3000, seeded())
    for objects in scenes.objects.tolist():
        present = [index for index in objects if index >= 0]
        assert not any(world.test_pairs[a, b] for a in present for b in present)
        if len(present) > 1 and len(set(present)) == 1:
            assert not world.test_counts[present[0], len(present)]


def test_every_test_scene_has_something_held_out(world):
    assert world.is_test(world.sample_scenes(500, seeded(), split="test")).all()
    assert not world.is_test(world.sample_scenes(500, seeded(), split="train")).any()


def test_about_a_tenth_of_pairs_and_counts_is_held_out(world):
    assert 0.05 < world.test_pairs.float().mean() < 0.15
    assert 0.05 < world.test_counts[:, 2:].float().mean() < 0.15
    assert torch.equal(world.test_pairs, world.test_pairs.T)


def test_pairs_held_out_at_one_difficulty_are_held_out_at_the_next(world):
    larger = ToyWorld(2)
    shared = [larger.names.index(name) for name in world.names]
    assert torch.equal(world.test_pairs, larger.test_pairs[shared][:, shared])
