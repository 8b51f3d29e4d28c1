"""The checker accepts the truth, and rejects every kind of damage."""

from dataclasses import replace

import pytest
import torch

from hydra_hf.toy.checker import ToyChecker
from hydra_hf.toy.language import CATEGORIES, ToyLanguage
from hydra_hf.toy.world import CANVAS, CANVASES, ToyWorld, places_on


NUM_PROMPTS = 25


@pytest.fixture(scope="module")
def world():
    return ToyWorld()


@pytest.fixture(scope="module")
def checker(world):
    return ToyChecker(world)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts_of(world: ToyWorld, category: str):
    return ToyLanguage(world).sample_prompts(NUM_PROMPTS, seeded(), categories=(category,))


def accepted(checker: ToyChecker, pictures, prompts) -> float:
    return sum(checker.check(picture, prompt) for picture, prompt in zip(pictures, prompts)) / len(prompts)


@pytest.mark.parametrize("category", CATEGORIES)
def test_true_pictures_pass_also_blurred_or_noisy(world, checker, category):
    prompts, scenes = prompts_of(world, category)
    pictures = world.render(scenes)
    noisy = pictures + 0.1 * torch.randn(pictures.shape, generator=seeded())
    blurred = torch.nn.functional.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    assert accepted(checker, pictures, prompts) >= 0.98
    assert accepted(checker, noisy, prompts) >= 0.95
    assert accepted(checker, blurred, prompts) >= 0.95


@pytest.mark.parametrize("canvas", [(48, 48), (48, 80), (128, 64), (96, 112), (128, 128)])
def test_true_pictures_of_any_canvas_pass_and_those_of_other_prompts_do_not(world, checker, canvas):
    assert canvas in CANVASES
    for category in ("counting", "position"):
        prompts, scenes = ToyLanguage(world).sample_prompts(6, seeded(), categories=(category,), canvas=canvas)
        pictures = world.render(scenes) + 0.05 * torch.randn(6, 3, *canvas, generator=seeded())
        assert accepted(checker, pictures, prompts) == 1
        assert accepted(checker, pictures, [*prompts[1:], prompts[0]]) == 0


@pytest.mark.parametrize("category", CATEGORIES)
def test_replaced_removed_and_added_objects_are_rejected(world, checker, category):
    prompts, scenes = prompts_of(world, category)
    replaced, removed, added = (scenes.objects.clone() for _ in range(3))
    others = torch.randint(1, len(world.names), (NUM_PROMPTS,), generator=seeded())
    replaced[:, 0] = (replaced[:, 0] + others) % len(world.names)
    removed[:, 0] = -1
    has_room = added[:, 3] < 0
    slots = (added >= 0).sum(1).clamp(max=3)
    added[has_room, slots[has_room]] = others[has_room]
    four = places_on(CANVAS)[3].expand(NUM_PROMPTS, -1, -1)
    assert accepted(checker, world.render(replace(scenes, objects=replaced)), prompts) <= 0.02
    assert accepted(checker, world.render(replace(scenes, objects=removed)), prompts) <= 0.02
    crowded = world.render(replace(scenes, objects=added, positions=four))[has_room]
    assert not any(checker.check(p, q) for p, q in zip(crowded, [q for q, room in zip(prompts, has_room) if room]))


def test_swapped_places_are_rejected_where_the_prompt_names_them(world, checker):
    for category, expected in (("position", 0.0), ("two_objects", 1.0)):
        prompts, scenes = prompts_of(world, category)
        swapped = replace(scenes, positions=scenes.positions[:, [1, 0, 2, 3]])
        assert accepted(checker, world.render(swapped), prompts) == expected


def test_exchanged_colors_are_rejected(world, checker):
    prompts, scenes = prompts_of(world, "color_attribution")
    exchanged = scenes.objects.clone()
    shape, color = (
        (exchanged[:, :2] - world.num_emoji).div(6, rounding_mode="floor"),
        (exchanged[:, :2] - world.num_emoji) % 6,
    )
    exchanged[:, :2] = world.num_emoji + 6 * shape + color.flip(1)
    assert accepted(checker, world.render(replace(scenes, objects=exchanged)), prompts) == 0.0


def test_noise_and_an_empty_canvas_hold_nothing(checker):
    assert checker.detect(torch.randn(3, 64, 64, generator=seeded())) == []
    assert checker.detect(torch.full((3, 64, 64), 0.9)) == []


def test_objects_are_found_where_they_stand(world, checker):
    prompts, scenes = prompts_of(world, "counting")
    for index, picture in enumerate(world.render(scenes)):
        count = len(prompts[index].objects)
        expected = {(prompts[index].objects[0], tuple(place)) for place in scenes.positions[index, :count].tolist()}
        assert set(checker.detect(picture)) == expected


def test_picture_of_another_size_is_an_error(checker):
    with pytest.raises(ValueError, match="48 to 128"):
        checker.detect(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="3, H, W"):
        checker.detect(torch.zeros(1, 64, 64))
