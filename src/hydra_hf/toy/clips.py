"""Clips of the toy world: up to two objects move along opposite sides, one after the other, a whole patch in four frames.

A clip knows what moves, which way, from where to where and what moves first; so it has a caption, questions with answers, and a
check of frames that should show it. After 4x temporal folding every latent frame ends with all objects on whole patches.
Objects are near, and all different.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checker import ToyChecker
from .language import Question, random_from
from .phrasing import NUMBERS, with_article
from .world import (
    CANVAS,
    PATCH,
    Placed,
    Scenes,
    ToyWorld,
    canvas_of,
    check_canvas,
    check_split,
    columns_and_rows,
    is_held_out,
    place_objects,
)


NUM_FRAMES = 17
GROUP = 4  # frames after the first one that become one latent frame; an object moves by a patch in them
SPEED = PATCH // GROUP  # pixels a frame
TOLERANCE = PATCH // 2  # pixels; an object that moves less rests
MAX_MOVERS = 2
DIRECTIONS = ("left", "right", "up", "down")
WAYS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}  # as a caption says it
# type -> how many objects move where it can be asked, how many there are where it is asked first: one picture cannot tell
CLIP_QUESTION_TYPES = {
    "what": ((0, 1, 2), (1, 2, 3)),
    "mover": ((1,), (2, 3)),
    "direction": ((1, 2), (1, 2, 3)),
    "count": ((0, 1, 2), (2,)),
    "first": ((2,), (2,)),
    "exist": ((0, 1, 2), (1, 2, 3)),
}


@dataclass(frozen=True)
class Track:
    """What one object does in a clip.

    Args:
        index: of the object in `ToyWorld.names`.
        start, end: its top left corner (x, y) in the first and in the last frame, in pixels; equal where it rests.
        departure: the last frame before it moves.
    """

    index: int
    start: tuple[int, int]
    end: tuple[int, int]
    departure: int = 0

    @property
    def direction(self) -> str | None:
        """One of `DIRECTIONS`, None for an object that rests."""
        return direction_between(self.start, self.end)

    def place(self, frame: int) -> tuple[int, int]:
        """Its top left corner in a frame."""
        reach = SPEED * max(0, frame - self.departure)
        return tuple(a + max(-reach, min(reach, b - a)) for a, b in zip(self.start, self.end))


@dataclass(frozen=True)
class Clip:
    """One clip and all that is true of it."""

    tracks: tuple[Track, ...]  # in reading order of the first frame
    background: int
    num_frames: int = NUM_FRAMES
    canvas: tuple[int, int] = CANVAS

    @property
    def movers(self) -> tuple[Track, ...]:
        """What moves, in the order in which it does."""
        return tuple(sorted((track for track in self.tracks if track.direction), key=lambda track: track.departure))

    @property
    def others(self) -> tuple[Track, ...]:
        """What rests."""
        return tuple(track for track in self.tracks if not track.direction)

    @property
    def relation(self) -> str | None:
        """Where the only mover is of all that rests, None where one of the two is missing."""
        if len(self.movers) != 1 or not self.others:
            return None
        (mover,), axis = self.movers, int(self.movers[0].direction in ("left", "right"))
        is_first = mover.start[axis] < self.others[0].start[axis]
        return (("left of", "right of"), ("above", "below"))[axis][not is_first]

    def placed(self, frame: int) -> list[Placed]:
        """Every object and its place in a frame."""
        return [(track.index, track.place(frame)) for track in self.tracks]


@dataclass(frozen=True)
class ClipVerdict:
    """What is right in frames that should show a clip.

    Args:
        objects: exactly the clip's objects in every fourth frame, the first and the last included. The rest needs that.
        directions: each object moves the way it should, and never back, or rests.
        order: what moves first.
        relation: where the only mover is of what rests; true where the caption does not say it.
    """

    objects: bool
    directions: bool
    order: bool
    relation: bool

    @property
    def is_right(self) -> bool:
        return self.objects and self.directions and self.order and self.relation


def direction_between(start: tuple[int, int], end: tuple[int, int], tolerance: int = 0) -> str | None:
    """Which of `DIRECTIONS` leads from `start` to `end`; None if they are one place, or both coordinates differ."""
    moved = [b - a for a, b in zip(start, end)]
    axes = [axis for axis in (0, 1) if abs(moved[axis]) > tolerance]
    if len(axes) != 1:
        return None
    return DIRECTIONS[2 * axes[0] + (moved[axes[0]] > 0)]


def first_scenes(clips: Sequence[Clip]) -> Scenes:
    """The scenes of the first frames, of clips on one canvas."""
    return place_objects([clip.placed(0) for clip in clips], [clip.background for clip in clips], canvas_of(clips))


def render_clips(world: ToyWorld, clips: Sequence[Clip], device: str | torch.device = "cpu") -> Tensor:
    """Frames (B, 3, T, H, W) in [-1, 1] of clips of one canvas and length; frame 0 is the picture of the first scene."""
    num_frames = clips[0].num_frames
    if any(clip.num_frames != num_frames for clip in clips):
        raise ValueError(f"Clips of {sorted({clip.num_frames for clip in clips})} frames, expected one length.")
    placed = [clip.placed(frame) for clip in clips for frame in range(num_frames)]
    backgrounds = [clip.background for clip in clips for _ in range(num_frames)]
    frames = world.render(place_objects(placed, backgrounds, canvas_of(clips))).unflatten(0, (len(clips), num_frames))
    return frames.transpose(1, 2).contiguous().to(device)


class ToyClips:
    """The clips of a world and what is said about them. Everything random comes from the generator of the caller.

    Held out for test, by hash: pairs of objects, as in pictures, and (object, direction) of what moves.
    """

    def __init__(self, world: ToyWorld):
        self.world = world
        self.test_moves = {
            (index, direction)
            for index, name in enumerate(world.names)
            for direction in DIRECTIONS
            if is_held_out(f"{name} moves {direction}")
        }

    # Clips

    def sample(
        self,
        num_clips: int,
        generator: torch.Generator,
        *,
        split: str = "train",
        num_movers: tuple[int, ...] = (0, 1, MAX_MOVERS),
        num_objects: tuple[int, ...] = (1, 2, 3),
        scattered: bool = True,
        num_frames: int = NUM_FRAMES,
        canvas: tuple[int, int] = CANVAS,
    ) -> list[Clip]:
        """Clips of one split; how many objects there are and how many move is drawn from these numbers, two movers being alone.

        Args:
            scattered: starts, distances and moments are random. Otherwise an object crosses the whole canvas, or as much as
                there is time for, the first at once and the second after it, and the caption leaves only the background open.
            num_frames: 4n + 1, of which each mover takes four or more.
        """
        check_split(split)
        check_canvas(canvas)
        if not num_movers or not set(num_movers) <= set(range(MAX_MOVERS + 1)):
            raise ValueError(f"{num_movers=} must be some of 0 to {MAX_MOVERS}.")
        if not num_objects or not set(num_objects) <= {1, 2, 3} or (MAX_MOVERS in num_movers and 2 not in num_objects):
            raise ValueError(f"{num_objects=} must be some of 1 to 3, with 2 where two objects move.")
        least = 1 + GROUP * max(1, *num_movers)
        if num_frames % GROUP != 1 or num_frames < least:
            raise ValueError(f"{num_frames=} must be 4n + 1, at least {least} for {max(num_movers)} movers.")
        rng, clips = random_from(generator), []
        while len(clips) < num_clips:
            count, clip = rng.choice(num_movers), None
            while clip is None or not self._is_of(split, clip):
                clip = self._propose(count, num_objects, scattered, num_frames, canvas, rng)
            clips.append(clip)
        return clips

    def _propose(
        self, num_movers: int, num_objects: tuple[int, ...], scattered: bool, num_frames: int, canvas: tuple[int, int],
        rng: random.Random,
    ) -> Clip:  # fmt: skip
        """Objects in two lanes at opposite sides, a mover in each, or one that the others face; alone in the middle."""
        num_lanes = max(1, num_movers)
        count = 2 if num_lanes == 2 else rng.choice(num_objects)
        axis = rng.randrange(2)
        along, across = columns_and_rows(canvas)[:: -1 if axis else 1]
        lanes = [across[0], across[2]]
        if count == 1:
            lanes = [rng.choice(across) if scattered else across[1]]
        elif num_lanes == 1 or scattered:
            rng.shuffle(lanes)
        moves = _moves(along[2], (num_frames - 1) // GROUP, num_lanes, scattered, rng)
        faced = {0: [], 1: [rng.choice(along) if scattered else along[1]], 2: [along[0], along[2]]}[count - num_lanes]
        spots = [(start, end, departure, lane) for (start, end, departure), lane in zip(moves, lanes)]
        spots += [(at, at, 0, lanes[-1]) for at in faced]
        if num_movers == 0:
            spots = [(start, start, 0, lane) for start, _, _, lane in spots]
        tracks = [
            Track(index, _at(axis, start, lane), _at(axis, end, lane), departure)
            for index, (start, end, departure, lane) in zip(rng.sample(range(len(self.world.names)), count), spots)
        ]
        tracks.sort(key=lambda track: track.start[::-1])
        return Clip(tuple(tracks), rng.randrange(self.world.num_backgrounds), num_frames, canvas)

    def _is_of(self, split: str, clip: Clip) -> bool:
        """What is held out in a test clip can be told from its caption; a lone object that rests is as in pictures."""
        objects = [track.index for track in clip.tracks]
        is_told = any((track.index, track.direction) in self.test_moves for track in clip.movers)
        is_told |= any(bool(self.world.test_pairs[a, b]) for a in objects for b in objects)
        is_test_picture = bool(self.world.is_test(first_scenes([clip])))
        if split == "train":
            return not is_told and not is_test_picture
        return is_told or (not clip.movers and is_test_picture)

    # Words

    def caption(self, clip: Clip) -> str:
        """ "a cat above a dog moves to the left", "a cat moves up, then a dog moves down"."""
        moves = [f"{self._named((mover,))} moves {WAYS[mover.direction]}" for mover in clip.movers]
        if not moves:
            return self._named(clip.tracks)
        if clip.relation:
            return moves[0].replace(" moves ", f" {clip.relation} {self._named(clip.others)} moves ")
        return ", then ".join(moves)

    def _named(self, tracks: Sequence[Track]) -> str:
        """ "a cat, a dog and a car"."""
        *most, last = [with_article(self.world.names[track.index]) for track in tracks]
        return f"{', '.join(most)} and {last}" if most else last

    def questions(
        self, clip: Clip, num_questions: int, rng: random.Random, *, weights: dict[str, int] | None = None
    ) -> list[Question]:
        """Questions about a clip, of the types that it allows, each as often as `weights` says; None is all alike.

        Raises ValueError for types that are not among `CLIP_QUESTION_TYPES`.
        """
        weights = _checked_weights(weights)
        possible = [kind for kind in weights if len(clip.movers) in CLIP_QUESTION_TYPES[kind][0]]
        if not possible:
            return []
        types = rng.choices(possible, [weights[kind] for kind in possible], k=num_questions)
        return [self._ask(kind, clip, rng) for kind in types]

    def _ask(self, kind: str, clip: Clip, rng: random.Random) -> Question:
        names, movers = self.world.names, clip.movers
        if kind == "what":
            return Question(kind, "what is there?", self._named(clip.tracks))
        if kind == "mover":
            return Question(kind, "what moves?", names[movers[0].index])
        if kind == "direction":
            mover = rng.choice(movers)
            return Question(kind, f"which way does the {names[mover.index]} move?", mover.direction)
        if kind == "count":
            return Question(kind, "how many objects move?", NUMBERS[len(movers)])
        if kind == "first":
            return Question(kind, "what moves first?", names[movers[0].index])
        present = [names[track.index] for track in clip.tracks]
        is_there = rng.random() < 0.5
        name = rng.choice(present if is_there else [name for name in names if name not in present])
        return Question(kind, f"is there {with_article(name)}?", "yes" if is_there else "no")

    # For training and evaluation

    def sample_prompts(
        self,
        num_prompts: int,
        generator: torch.Generator,
        *,
        split: str = "train",
        num_frames: int = NUM_FRAMES,
        canvas: tuple[int, int] = CANVAS,
    ) -> tuple[list[str], list[Clip]]:
        """Captions of one or two objects, and for each a clip that fulfils it; only the background is open."""
        movers = (1, MAX_MOVERS) if num_frames > GROUP * MAX_MOVERS else (1,)
        clips = self.sample(num_prompts, generator, split=split, num_movers=movers, num_objects=(1, 2), scattered=False,
                            num_frames=num_frames, canvas=canvas)  # fmt: skip
        return [self.caption(clip) for clip in clips], clips

    def sample_turns(
        self,
        num_clips: int,
        generator: torch.Generator,
        questions_per_clip: int = 1,
        *,
        weights: dict[str, int] | None = None,
        split: str = "train",
        num_frames: int = NUM_FRAMES,
        canvas: tuple[int, int] = CANVAS,
    ) -> tuple[list[Clip], list[list[Question]]]:
        """Clips with at most `questions_per_clip` questions each, of `weights` as in `questions`; none is asked twice.

        Clips are scattered, else where an object ends would tell which way it moved. The first question is chosen before the
        clip, so that what is asked says nothing of how many objects move.
        """
        weights, longest = _checked_weights(weights), min(MAX_MOVERS, (num_frames - 1) // GROUP)
        movers = {kind: tuple(count for count in CLIP_QUESTION_TYPES[kind][0] if count <= longest) for kind in weights}
        possible = [kind for kind in weights if movers[kind]]
        if not possible:
            raise ValueError(f"{num_frames=} are too few for questions of type {sorted(weights)}.")
        rng, clips, asked = random_from(generator), [], []
        for kind in rng.choices(possible, [weights[kind] for kind in possible], k=num_clips):
            options = {"num_movers": movers[kind], "num_objects": CLIP_QUESTION_TYPES[kind][1]}
            (clip,) = self.sample(1, generator, split=split, num_frames=num_frames, canvas=canvas, **options)
            turns = [self._ask(kind, clip, rng), *self.questions(clip, questions_per_clip - 1, rng, weights=weights)]
            clips.append(clip)
            asked.append(list({turn.question: turn for turn in turns}.values()))
        return clips, asked


def clip_corpus() -> list[str]:
    """Texts with every word that is said about clips besides those of `ToyLanguage.corpus`, for a tokenizer."""
    return [
        *(f"a cat moves {way}, then a dog moves {way}" for way in WAYS.values()),
        "what is there? a cat, a dog and a car", "what moves?", "what moves first?", "how many objects move? zero one two",
        *(f"which way does the cat move? {direction}" for direction in DIRECTIONS),
    ]  # fmt: skip


def check_clip(checker: ToyChecker, frames: Tensor, clip: Clip) -> ClipVerdict:
    """Whether frames (3, T, H, W) in [-1, 1] show what the caption of `clip` says, wherever and on any background and canvas.

    Raises ValueError for a number of frames that is not 4n + 1.
    """
    if frames.ndim != 4 or frames.shape[1] % GROUP != 1 or frames.shape[1] == 1:
        raise ValueError(f"A clip of the toy world is (3, 4n + 1, H, W), got {tuple(frames.shape)}.")
    expected = sorted(track.index for track in clip.tracks)
    seen = []
    for frame in frames[:, ::GROUP].unbind(1):
        seen.append(checker.detect(frame))
        if sorted(index for index, _ in seen[-1]) != expected:
            return ClipVerdict(False, False, False, False)
    paths = {index: [dict(found)[index] for found in seen] for index in expected}
    shown = {index: _shown_direction(path) for index, path in paths.items()}
    middles = [_middle(paths[mover.index]) for mover in clip.movers]
    return ClipVerdict(
        objects=True,
        directions=all(shown[track.index] == track.direction for track in clip.tracks),
        order=all(a < b for a, b in zip(middles, middles[1:])),
        relation=clip.relation is None or all(_is_related(clip, found) for found in (seen[0], seen[-1])),
    )


def _moves(
    room: int, num_groups: int, num_movers: int, scattered: bool, rng: random.Random
) -> list[tuple[int, int, int]]:
    """Start and end along a lane of `room` pixels, and the frame of departure, of objects that move one after the other."""
    longest = min(room // PATCH, num_groups // num_movers)
    distances = [rng.randint(1, longest) if scattered else longest for _ in range(num_movers)]
    slack, group, moves = num_groups - sum(distances), 0, []
    for distance in distances:
        start = PATCH * rng.randint(0, room // PATCH - distance) if scattered else 0
        end = start + PATCH * distance
        if rng.random() < 0.5:
            start, end = room - start, room - end
        wait = rng.randint(0, slack) if scattered else 0
        moves.append((start, end, GROUP * (group + wait)))
        slack, group = slack - wait, group + wait + distance
    return moves


def _checked_weights(weights: dict[str, int] | None) -> dict[str, int]:
    weights = dict.fromkeys(CLIP_QUESTION_TYPES, 1) if weights is None else weights
    if unknown := set(weights) - set(CLIP_QUESTION_TYPES):
        raise ValueError(f"questions of type {sorted(unknown)} are not among {list(CLIP_QUESTION_TYPES)}.")
    return weights


def _at(axis: int, along: int, across: int) -> tuple[int, int]:
    """(x, y) of a place along x (axis 0) or y (axis 1)."""
    return (across, along) if axis else (along, across)


def _shown_direction(path: list[tuple[int, int]]) -> str | None:
    """Which way an object moves, None if it rests; "back and forth" or "askew" otherwise."""
    steps = {direction_between(a, b, TOLERANCE) for a, b in zip(path, path[1:])} - {None}
    direction = direction_between(path[0], path[-1], TOLERANCE)
    if direction is None:
        is_askew = any(abs(a - b) > TOLERANCE for a, b in zip(path[0], path[-1]))
        return "askew" if is_askew else "back and forth" if steps else None
    return direction if steps <= {direction} else "back and forth"


def _middle(path: list[tuple[int, int]]) -> float:
    """When an object is half of the way, in latent frames."""
    shares = [sum(abs(a - b) for a, b in zip(place, path[0])) for place in path]
    return next(frame for frame, share in enumerate(shares) if share >= shares[-1] / 2)


def _is_related(clip: Clip, found: list[Placed]) -> bool:
    """Whether the mover is where it should be of everything that rests."""
    places, axis = dict(found), int(clip.relation in ("above", "below"))
    (mover,) = clip.movers
    gaps = [places[other.index][axis] - places[mover.index][axis] for other in clip.others]
    sign = 1 if clip.relation in ("left of", "above") else -1
    return all(sign * gap > TOLERANCE for gap in gaps)
