"""Clips of the toy world: what moves is what their captions, their answers and the checker say."""

import random
import re
from dataclasses import replace

import pytest
import torch

from hydra_hf.toy.checker import ToyChecker
from hydra_hf.toy.clips import (
    CLIP_QUESTION_TYPES,
    DIRECTIONS,
    Clip,
    ToyClips,
    check_clip,
    clip_corpus,
    first_scenes,
    render_clips,
)
from hydra_hf.toy.evaluation import majority_shares
from hydra_hf.toy.language import Question, ToyLanguage
from hydra_hf.toy.phrasing import NUMBERS, with_article
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer
from hydra_hf.toy.world import PATCH, ToyWorld, sprite_size


NUM_CLIPS = 8
CAPTION = re.compile(
    r"an? ([\w ]+?)(?: (above|below|left of|right of) an? ([\w ]+))? moves (to the left|to the right|up|down)"
)


@pytest.fixture(scope="module")
def world():
    return ToyWorld()


@pytest.fixture(scope="module")
def clips(world):
    return ToyClips(world)


@pytest.fixture(scope="module")
def checker(world):
    return ToyChecker(world)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def paths_of(clip: Clip) -> dict[int, list[tuple[int, int]]]:
    """The places of every object in every frame."""
    frames = [dict(clip.placed(frame)) for frame in range(clip.num_frames)]
    return {track.index: [frame[track.index] for frame in frames] for track in clip.tracks}


def way_of(path: list[tuple[int, int]]) -> str | None:
    """Which way an object goes, read from its places."""
    x, y = (path[-1][axis] - path[0][axis] for axis in (0, 1))
    assert not (x and y)
    return "left" if x < 0 else "right" if x > 0 else "up" if y < 0 else "down" if y > 0 else None


def first_step(path: list[tuple[int, int]]) -> int:
    return next(frame for frame in range(len(path)) if path[frame] != path[0])


# Motion


@pytest.mark.parametrize("canvas", [(64, 64), (48, 48), (64, 128), (112, 80)])
@pytest.mark.parametrize("scattered", [False, True])
def test_objects_move_a_whole_patch_in_four_frames_inside_the_canvas_and_never_meet(clips, canvas, scattered):
    size = sprite_size(canvas)
    for clip in clips.sample(40, seeded(), canvas=canvas, scattered=scattered):
        paths = paths_of(clip)
        assert clip.num_frames == 17
        for path in paths.values():
            assert all(at % PATCH == 0 for place in path[::4] for at in place)  # where each latent frame ends
            assert all(0 <= x <= canvas[1] - size and 0 <= y <= canvas[0] - size for x, y in path)
            steps = {(b[0] - a[0], b[1] - a[1]) for a, b in zip(path, path[1:])} - {(0, 0)}
            assert len(steps) <= 1  # at one speed in one direction
            assert all(sorted(map(abs, step)) == [0, 4] for step in steps)
        for frame in zip(*paths.values()):
            gaps = [max(abs(a - b) for a, b in zip(one, two)) for i, one in enumerate(frame) for two in frame[:i]]
            assert all(gap >= size for gap in gaps)


@pytest.mark.parametrize("num_frames", [5, 9, 17, 33])
def test_movers_take_turns_in_clips_of_any_length(clips, num_frames):
    movers = (2,) if num_frames > 5 else (1,)
    for clip in clips.sample(20, seeded(), num_frames=num_frames, num_movers=movers):
        moving = [{f for f in range(num_frames) if path[f] != path[f - 1] and f} for path in paths_of(clip).values()]
        assert sum(map(bool, moving)) == movers[0]
        assert not set.intersection(*moving) or len(moving) == 1
        assert [first_step(paths_of(clip)[mover.index]) for mover in clip.movers] == sorted(
            min(frames) for frames in moving if frames
        )


def test_the_first_frame_is_the_picture_of_the_first_scene_bit_for_bit(world, clips):
    for difficulty in (1, 2, 3):
        world = ToyWorld(difficulty)
        sampled = ToyClips(world).sample(8, seeded())
        frames = render_clips(world, sampled)
        assert frames.shape == (8, 3, 17, 64, 64)
        assert frames.abs().max() <= 1 + 1e-5
        assert torch.equal(frames[:, :, 0], world.render(first_scenes(sampled)))
        is_still = torch.tensor([not clip.movers for clip in sampled])
        assert torch.equal((frames == frames[:, :, :1]).flatten(1).all(1), is_still)


def test_clips_of_two_canvases_or_lengths_are_no_batch(world, clips):
    one, wide, long = (
        clips.sample(1, seeded(), **options) for options in ({}, {"canvas": (64, 96)}, {"num_frames": 33})
    )
    with pytest.raises(ValueError, match=r"canvases \[\(64, 64\), \(64, 96\)\]"):
        render_clips(world, one + wide)
    with pytest.raises(ValueError, match=r"\[17, 33\] frames"):
        render_clips(world, one + long)


def test_equal_seeds_give_equal_clips(clips):
    assert clips.sample(20, seeded(1)) == clips.sample(20, seeded(1)) != clips.sample(20, seeded(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "split"),
        ({"num_frames": 16}, r"num_frames=16 must be 4n \+ 1"),
        ({"num_frames": 5}, "at least 9 for 2 movers"),
        ({"num_frames": 1}, "num_frames=1"),
        ({"num_movers": (3,)}, "num_movers"),
        ({"num_movers": (2,), "num_objects": (1,)}, "num_objects"),
        ({"num_objects": (4,)}, "num_objects"),
        ({"canvas": (32, 32)}, "canvas"),
    ],
)
def test_a_wrong_sampling_argument_is_an_error(clips, arguments, message):
    with pytest.raises(ValueError, match=message):
        clips.sample(1, seeded(), **arguments)


# Words


def test_a_caption_says_who_moves_which_way_and_in_which_order(world, clips):
    captions, sampled = clips.sample_prompts(200, seeded())
    for caption, clip in zip(captions, sampled):
        paths, (named, others) = paths_of(clip), ([], [])
        for match in map(CAPTION.fullmatch, caption.split(", then ")):
            name, relation, other, way = match.groups()
            named.append(world.names.index(name))
            assert way_of(paths[named[-1]]) == way.removeprefix("to the ")
            if relation:
                others.append(world.names.index(other))
                (x, y), (other_x, other_y) = paths[named[-1]][0], paths[others[-1]][-1]
                truth = {"above": y < other_y, "below": y > other_y, "left of": x < other_x, "right of": x > other_x}
                assert truth[relation]
        assert sorted(named + others) == sorted(paths)
        assert all(way_of(paths[other]) is None for other in others)
        assert [first_step(paths[index]) for index in named] == sorted(first_step(paths[index]) for index in named)
    assert {len(clip.movers) for clip in sampled} == {1, 2}


def test_given_a_caption_only_the_background_is_open(clips):
    captions, sampled = clips.sample_prompts(1500, seeded())
    known = {}
    for caption, clip in zip(captions, sampled):
        assert known.setdefault(caption, clip.tracks) == clip.tracks
    assert len(known) < 1400  # many are said twice


def recomputed_answer(question: str, world: ToyWorld, clip: Clip) -> str:
    """The answer read from the sentence and the places of all objects in all frames."""
    paths = {world.names[index]: path for index, path in paths_of(clip).items()}
    moving = [name for name in paths if way_of(paths[name])]
    if question == "what is there?":
        named = [with_article(name) for name in sorted(paths, key=lambda name: paths[name][0][::-1])]
        return " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)
    if question == "what moves?":
        (name,) = moving
        return name
    if match := re.fullmatch(r"which way does the (.+) move\?", question):
        return way_of(paths[match[1]])
    if question == "how many objects move?":
        return NUMBERS[len(moving)]
    if question == "what moves first?":
        assert len(moving) == 2
        return min(moving, key=lambda name: first_step(paths[name]))
    match = re.fullmatch(r"is there (.+)\?", question)
    return "yes" if match[1] in map(with_article, paths) else "no"


def one_question_each(clips: ToyClips, num_clips: int) -> tuple[list[Clip], list[Question]]:
    sampled, asked = clips.sample_turns(num_clips, seeded(), split="test")
    return sampled, [question for (question,) in asked]


def test_answers_are_true_of_the_clip_and_the_commonest_is_a_poor_guess(world, clips):
    sampled, questions = one_question_each(clips, 900)
    for clip, question in zip(sampled, questions):
        assert question.answer == recomputed_answer(question.question, world, clip), (question, clip)
    shares = majority_shares(questions)
    assert set(shares) == set(CLIP_QUESTION_TYPES)
    limits = {"exist": 0.57, "count": 0.43, "direction": 0.36, "first": 0.15, "mover": 0.15, "what": 0.05}
    assert all(shares[name] < limit for name, limit in limits.items()), shares


def test_neither_the_last_frame_nor_the_order_on_the_canvas_gives_a_motion_away(clips):
    sampled = clips.sample(800, seeded(), num_movers=(1, 2))
    single = [clip.movers[0] for clip in sampled if len(clip.movers) == 1]
    is_at_the_edge = {"left": lambda x, y: x == 0, "right": lambda x, y: x == 32, "up": lambda x, y: y == 0}
    for direction, holds in is_at_the_edge.items():  # an object there has as often moved along that edge
        there = [track.direction for track in single if holds(*track.end)]
        assert there.count(direction) / len(there) < 0.6
    pairs = [clip for clip in sampled if len(clip.movers) == 2]
    assert 0.4 < sum(clip.movers[0] == clip.tracks[0] for clip in pairs) / len(pairs) < 0.6


def test_the_number_of_objects_does_not_tell_how_many_move_nor_what_moves(clips):
    sampled, questions = one_question_each(clips, 900)
    asked = {kind: [clip for clip, q in zip(sampled, questions) if q.type == kind] for kind in CLIP_QUESTION_TYPES}
    assert {len(clip.tracks) for clip in asked["count"]} == {2}
    assert {len(clip.tracks) for clip in asked["mover"]} == {2, 3}
    assert {len(clip.tracks) for clip in asked["what"]} == {1, 2, 3}


def test_nothing_is_asked_twice_of_one_clip(clips):
    _, asked = clips.sample_turns(60, seeded(), 5)
    assert all(len({turn.question for turn in turns}) == len(turns) for turns in asked)
    assert max(map(len, asked)) >= 4
    _, first = clips.sample_turns(20, seeded(), 3, weights={"first": 1})
    assert {turn.question for turns in first for turn in turns} == {"what moves first?"}
    with pytest.raises(ValueError, match="too few for questions of type \\['first'\\]"):
        clips.sample_turns(1, seeded(), weights={"first": 1}, num_frames=5)
    with pytest.raises(ValueError, match="speed"):
        clips.questions(clips.sample(1, seeded())[0], 1, random.Random(0), weights={"speed": 1})


def test_every_word_that_is_said_is_in_the_corpora_and_old_words_keep_their_vocabulary(world, clips):
    language = ToyLanguage(world)
    corpus = language.corpus() + clip_corpus()
    known = set(re.findall(r"\w+|[^\w\s]", " ".join(corpus).lower()))
    _, asked = clips.sample_turns(300, seeded(), 4)
    said = clips.sample_prompts(200, seeded())[0] + [f"{q.question} {q.answer}" for turns in asked for q in turns]
    assert {word for text in said for word in re.findall(r"\w+|[^\w\s]", text)} <= known
    tokenizer = train_toy_tokenizer(corpus)
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in known if word.isalpha())


# Splits


def test_no_pair_and_no_motion_of_a_test_clip_occurs_in_training(world, clips):
    def keys(sampled: list[Clip]) -> set:
        pairs = {frozenset((a.index, b.index)) for clip in sampled for a in clip.tracks for b in clip.tracks if a != b}
        return pairs | {(mover.index, mover.direction) for clip in sampled for mover in clip.movers}

    train, test = clips.sample(800, seeded()), clips.sample(200, seeded(), split="test", num_movers=(1, 2))
    trained = keys(train)
    assert all(keys([clip]) - trained for clip in test)
    held_out = {frozenset(pair) for pair in world.test_pairs.nonzero().tolist()} | clips.test_moves
    assert not trained & held_out
    assert all(keys([clip]) & held_out for clip in test)
    assert not world.is_test(first_scenes(train)).any()
    assert 0.05 < len(clips.test_moves) / (len(world.names) * len(DIRECTIONS)) < 0.15


# The checker


def accepted(checker: ToyChecker, frames: torch.Tensor, clips: list[Clip]) -> float:
    return sum(check_clip(checker, one, clip).is_right for one, clip in zip(frames, clips)) / len(clips)


@pytest.fixture(scope="module")
def drawn(world, clips):
    """Clips of which every object or two move, and their frames."""
    _, sampled = clips.sample_prompts(NUM_CLIPS, seeded())
    return sampled, render_clips(world, sampled)


def test_true_clips_pass_also_noisy_ones(checker, drawn):
    sampled, frames = drawn
    noisy = frames + 0.1 * torch.randn(frames.shape, generator=seeded())
    assert accepted(checker, frames, sampled) == 1
    assert accepted(checker, noisy, sampled) >= 0.95


def test_scattered_and_still_clips_pass_on_other_canvases_too(world, clips, checker):
    for canvas in ((64, 64), (48, 64), (64, 112)):
        sampled = clips.sample(4, seeded(), canvas=canvas)
        assert accepted(checker, render_clips(world, sampled), sampled) == 1


def test_reversed_frozen_and_foreign_clips_are_rejected(world, checker, drawn):
    sampled, frames = drawn
    assert accepted(checker, frames.flip(2), sampled) == 0
    assert accepted(checker, frames[:, :, :1].expand_as(frames), sampled) == 0
    assert accepted(checker, frames.roll(1, dims=0), sampled) == 0
    others = [
        replace(
            clip, tracks=tuple(replace(track, index=(track.index + 7) % len(world.names)) for track in clip.tracks)
        )
        for clip in sampled
    ]
    assert accepted(checker, render_clips(world, others), sampled) == 0
    vanishing = frames.clone()
    vanishing[:, :, -1] = vanishing[:, :, :1, :1, :1].expand(-1, -1, -1, 64, 64)[:, :, 0]
    assert accepted(checker, vanishing, sampled) == 0


def test_what_is_wrong_is_named(world, clips, checker):
    pairs = clips.sample(8, seeded(), num_movers=(2,))
    for clip in pairs:
        first, second = clip.movers
        length = max(abs(a - b) for a, b in zip(first.start, first.end)) // 4
        turned = {first: replace(first, departure=second.departure), second: replace(second, departure=0)}
        swapped = replace(clip, tracks=tuple(turned[track] for track in clip.tracks))
        if second.departure + length <= 16:
            verdict = check_clip(checker, render_clips(world, [swapped])[0], clip)
            assert (verdict.objects, verdict.directions, verdict.order, verdict.is_right) == (True, True, False, False)
    related = [clip for clip in clips.sample(60, seeded(), num_movers=(1,)) if clip.relation in ("above", "below")][:4]
    for clip in related:  # upside down
        tracks = tuple(
            replace(track, start=(track.start[0], 32 - track.start[1]), end=(track.end[0], 32 - track.end[1]))
            for track in clip.tracks
        )
        verdict = check_clip(checker, render_clips(world, [replace(clip, tracks=tracks)])[0], clip)
        assert (verdict.objects, verdict.directions, verdict.relation, verdict.is_right) == (True, True, False, False)


def test_an_object_that_comes_back_has_not_moved(checker, drawn):
    sampled, frames = drawn
    back_and_forth = torch.cat([frames[:, :, :9], frames[:, :, :8].flip(2)], dim=2)
    again = torch.cat([frames[:, :, :9], frames[:, :, :4], frames[:, :, 8:12]], dim=2)  # a jump back to the start
    lone = [index for index, clip in enumerate(sampled) if len(clip.movers) == 1]
    for damaged in (back_and_forth, again):
        assert not any(check_clip(checker, damaged[index], sampled[index]).directions for index in lone)


def test_frames_of_another_number_are_an_error(checker, drawn):
    sampled, frames = drawn
    for wrong in (frames[0, :, :16], frames[0, :, :1], frames[0, :, 0]):
        with pytest.raises(ValueError, match=r"4n \+ 1"):
            check_clip(checker, wrong, sampled[0])
