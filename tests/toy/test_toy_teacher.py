"""The toy world's stand-ins for a pretrained ViT and a video teacher."""

import pytest
import torch

from hydra_hf.modeling import HydraTokConfig
from hydra_hf.toy.clips import DIRECTIONS, ToyClips, direction_between, render_clips
from hydra_hf.toy.teacher import ToyTeacher, ToyVideoTeacher, place_codes
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.teachers import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(ToyTeacher)


def states_of(teacher, pixel_values: torch.Tensor) -> torch.Tensor:
    """Of pixels in [-1, 1], which a teacher gets in the presets' statistics."""
    config = HydraTokConfig()
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    (states,) = teacher(((pixel_values + 1) / 2 - mean) / std, (5,))
    return states.unflatten(1, (pixel_values.shape[-2] // 16, -1))


@pytest.fixture(scope="module")
def seen(teacher):
    """Scenes, their objects on the patch grid (B, 4, 4), -1 where there is none, and the teacher's states."""
    world = ToyWorld(1)
    scenes = world.sample_scenes(64, torch.Generator().manual_seed(0))
    objects = torch.full((64, 4, 4), -1)
    for index in range(64):
        for slot in range(4):
            if scenes.objects[index, slot] >= 0:
                x, y = (scenes.positions[index, slot] // 16).tolist()
                objects[index, y : y + 2, x : x + 2] = scenes.objects[index, slot]
    return scenes, objects, states_of(teacher, world.render(scenes))


def test_patches_of_the_background_have_a_place_and_no_name(seen):
    _, objects, states = seen
    assert states[objects < 0][:, :128].abs().sum() == 0
    torch.testing.assert_close(states[..., 128:].norm(dim=-1), torch.ones(64, 4, 4))


def test_two_patches_have_one_name_exactly_if_they_are_of_one_kind_of_object(seen):
    _, objects, states = seen
    names = states[..., :96].flatten(0, 2)
    is_seen = (objects.flatten() >= 0) & (names.norm(dim=-1) > 0)  # a few corners of emoji are empty
    assert is_seen.sum() > 0.95 * (objects >= 0).sum()
    names, kinds = names[is_seen], objects.flatten()[is_seen]
    is_same = (names[:, None] - names).norm(dim=-1) < 1e-5
    assert torch.equal(is_same, kinds[:, None] == kinds)


def test_near_and_far_differ_and_the_name_does_not(teacher):
    world = ToyWorld(1)
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(1), max_objects=1)
    near, far = (states_of(teacher, world.render(type(scenes)(**{**vars(scenes), "distances": distances})))
                 for distances in (torch.full((1, 4), 1.0), torch.full((1, 4), 2.0)))  # fmt: skip
    torch.testing.assert_close(near[..., :96], far[..., :96])
    assert (near[..., 96:128] - far[..., 96:128]).norm() > 1


def test_every_place_has_its_own_code(teacher):
    places = states_of(teacher, torch.zeros(1, 3, 64, 64))[0, ..., 128:].flatten(0, 1)
    assert (places @ places.T - 2 * torch.eye(16)).amax() < 0.95


def test_a_place_is_a_share_of_the_picture():
    """The middle token of 3, 5 or 7 in a row has one code, apart from the mean that each grid is freed of."""
    middles = [place_codes((1, width), 64)[width // 2] for width in (3, 5, 7)]
    edges = [place_codes((1, width), 64)[0] for width in (3, 5, 7)]
    assert min(middles[0] @ middles[1], middles[1] @ middles[2]) > 0.9 > max(a @ b for a, b in zip(middles, edges))


def test_a_small_object_has_the_name_of_the_large_one(teacher):
    world = ToyWorld(1)
    names = [
        states_of(teacher, world.render(world.sample_scenes(1, torch.Generator().manual_seed(1), max_objects=1, canvas=canvas)))
        [..., :96].flatten(0, 2).unique(dim=0)
        for canvas in ((64, 64), (48, 48))
    ]  # fmt: skip
    torch.testing.assert_close(*names)
    assert len(names[0]) == 2  # the object's and none


# Clips


@pytest.fixture(scope="module")
def taught():
    """Clips, and the video teacher's states on the grid of every fourth frame after the first."""
    world, teacher = ToyWorld(1), ToyVideoTeacher()
    clips = ToyClips(world).sample(24, torch.Generator().manual_seed(0))
    pixel_values = render_clips(world, clips)
    states, grid = teacher(pixel_values)
    assert grid == (4, 4, 4)
    return clips, pixel_values, states.unflatten(1, grid), teacher.motion_codes


def test_the_video_teacher_says_which_way_each_object_has_come(taught):
    clips, _, states, codes = taught
    seen = set()
    for clip, frames in zip(clips, states):
        for index, frame in enumerate(frames):
            for track in clip.tracks:
                (x, y), before = track.place(4 * index + 4), track.place(4 * index)
                way = direction_between(before, (x, y))
                motions = frame[y // 16 : y // 16 + 2, x // 16 : x // 16 + 2, 96:128].flatten(0, 1)
                motions = motions[motions.norm(dim=-1) > 0]  # a few corners of emoji are empty
                assert len(motions)
                torch.testing.assert_close(motions, codes[DIRECTIONS.index(way) + 1 if way else 0].expand_as(motions))
                seen.add(way)
    assert seen == {None, *DIRECTIONS}


def test_the_video_teacher_names_objects_as_the_teacher_of_images_does(taught, teacher):
    _, pixel_values, states, _ = taught
    for index in range(4):
        images = states_of(teacher, pixel_values[:, :, 4 * index + 4])
        torch.testing.assert_close(states[:, index, ..., :96], images[..., :96])
        torch.testing.assert_close(states[:, index, ..., 128:], images[..., 128:])
