"""Edits of the toy world: a picture, an instruction that changes one object, and the picture that it asks for.

Outside the boxes of the changed object both pictures are equal, pixel for pixel. Objects are near, and all different.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

from hydra_hf.data.sample import Sample
from hydra_hf.data.tasks import TASKS
from hydra_hf.evaluation.metrics import psnr

from .checker import ToyChecker
from .language import chat, place_of, random_from
from .phrasing import PHRASINGS, PLAIN, RELATIONS, with_article
from .world import (
    CANVAS,
    COLORS,
    LAYOUTS,
    MAX_OBJECTS,
    PATCH,
    Placed,
    Scenes,
    ToyWorld,
    canvas_of,
    check_canvas,
    check_split,
    color_fields,
    columns_and_rows,
    is_held_out,
    place_objects,
    sprite_size,
)


TOLERANCE = PATCH // 2  # pixels from the place where an object should be
REQUESTS = {
    "recolor": ("make the {a} {b}", "paint the {a} {b}", "turn the {a} {b}", "change the color of the {a} to {b}"),
    "remove": ("remove the {a}", "take away the {a}", "delete the {a}", "take the {a} away"),
    "add": ("add {a} {b}", "put {a} {b}", "insert {a} {b}", "place {a} {b}"),
    "replace": (
        "replace the {a} with {b}",
        "turn the {a} into {b}",
        "swap the {a} for {b}",
        "change the {a} into {b}",
    ),
    "move": ("move the {a} {b}", "bring the {a} {b}", "shift the {a} {b}", "push the {a} {b}"),
}
EDIT_KINDS = tuple(REQUESTS)
MANNERS = ("{}", "{}.", "please {}", "{}, please", "can you {}?", "could you {}?", "i want you to {}", "now {}")


def _forms_of(requests: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What training says, and what it does not: one in four of the forms that are not plain, by hash."""
    forms = [manner.format(request) for manner, request in product(MANNERS, requests)]
    held_out = tuple(form for form in forms if form not in requests and is_held_out(form, share=4))
    return tuple(form for form in forms if form not in held_out), held_out


FORMS = {kind: _forms_of(requests) for kind, requests in REQUESTS.items()}


@dataclass(frozen=True)
class Edit:
    """One edit: what to do, and what is where before and after it."""

    kind: str
    instruction: str
    source: tuple[Placed, ...]
    target: tuple[Placed, ...]
    background: int
    canvas: tuple[int, int] = CANVAS

    @property
    def objects(self) -> tuple[int, ...]:
        """All that are in one of the pictures."""
        return tuple(sorted({index for index, _ in self.source + self.target}))


@dataclass(frozen=True)
class EditVerdict:
    """How well a picture follows an edit.

    Args:
        is_followed: exactly the objects of the target are there, each within half a patch of its place.
        psnr_outside: in dB outside the edited region, against the source; equal pictures have 100.
    """

    is_followed: bool
    psnr_outside: float


def source_scenes(edits: Sequence[Edit]) -> Scenes:
    """The scenes before the edits, which have one canvas."""
    return place_objects([edit.source for edit in edits], [edit.background for edit in edits], canvas_of(edits))


def target_scenes(edits: Sequence[Edit]) -> Scenes:
    """The scenes after the edits, which have one canvas."""
    return place_objects([edit.target for edit in edits], [edit.background for edit in edits], canvas_of(edits))


def edited_regions(edits: Sequence[Edit]) -> Tensor:
    """Where something changes, (B, H, W) bool: the boxes of the object before and after, whole patches."""
    size, (height, width) = sprite_size(canvas_of(edits)), canvas_of(edits)
    regions = torch.zeros(len(edits), height, width, dtype=torch.bool)
    for region, edit in zip(regions, edits):
        for _, (x, y) in set(edit.source) ^ set(edit.target):
            region[y : y + size, x : x + size] = True
    return regions


class ToyEdits:
    """The edits of a world. Everything random comes from the generator of the caller.

    Held out for test, by hash: pairs of objects, as in pictures, where the old and the new object count as one; and
    (object, destination) of an object that is moved and alone.
    """

    def __init__(self, world: ToyWorld):
        self.world = world

    def sample(
        self,
        num_edits: int,
        generator: torch.Generator,
        *,
        kinds: tuple[str, ...] = EDIT_KINDS,
        split: str = "train",
        wording: str = "train",
        max_objects: int = MAX_OBJECTS,
        canvas: tuple[int, int] = CANVAS,
    ) -> list[Edit]:
        """Edits of one split, each of `kinds` as often; the fuller of the two pictures has at most `max_objects`.

        Args:
            wording: "train" for forms that training shows, half of them plain, also where the split is held out; "test" for forms
                that it never shows.
        """
        check_split(split)
        check_canvas(canvas)
        if wording not in ("train", "test"):
            raise ValueError(f"{wording=} must be 'train' or 'test'.")
        if not kinds or set(kinds) - set(EDIT_KINDS):
            raise ValueError(f"{kinds=} must be some of {EDIT_KINDS}.")
        if not 2 <= max_objects <= MAX_OBJECTS:
            raise ValueError(f"{max_objects=} of an edit must be between 2 and {MAX_OBJECTS}.")
        rng, edits = random_from(generator), []
        while len(edits) < num_edits:
            kind, edit = rng.choice(kinds), None
            while edit is None or not self._is_of(split, edit):
                edit = self._propose(kind, wording, max_objects, canvas, rng)
            edits.append(edit)
        return edits

    def _propose(
        self, kind: str, wording: str, max_objects: int, canvas: tuple[int, int], rng: random.Random
    ) -> Edit | None:
        """Different objects in some places of a random layout, one of them edited; None where the edit is not possible."""
        columns, rows = columns_and_rows(canvas)
        layout = [(columns[x], rows[y]) for x, y in rng.choice(list(LAYOUTS.values()))]
        count = rng.randint(1, min(len(layout), max_objects))
        places = [layout[slot] for slot in sorted(rng.sample(range(len(layout)), count))]
        placed = list(zip(rng.sample(range(len(self.world.names)), count), places))
        slot = rng.randrange(count)
        old, rest = placed[slot], placed[:slot] + placed[slot + 1 :]
        options = self._options(kind, old, rest, canvas, wording, rng)
        if not options:
            return None
        new, words = rng.choice(options)
        source, target = [*rest, *([old] if kind != "add" else [])], [*rest, *([new] if new else [])]
        background = rng.randrange(self.world.num_backgrounds)
        instruction = _choose_form(kind, wording, rng).format(**words)
        return Edit(kind, instruction, tuple(source), tuple(target), background, canvas)

    def _options(
        self, kind: str, old: Placed, rest: list[Placed], canvas: tuple[int, int], wording: str, rng: random.Random
    ) -> list[tuple[Placed | None, dict[str, str]]]:
        """What can be done with an object among others: the object after it, and the words for it."""
        name = self.world.names[old[0]]
        if kind == "recolor":
            return self._recolored(old, rest, rng)
        if kind == "remove":
            return [(None, {"a": name})] if rest else []
        if kind == "add":
            where = _where(old[1], [(self.world.names[index], place) for index, place in rest], canvas, wording, rng)
            return [(old, {"a": with_article(name), "b": where})] if rest else []
        if kind == "move":
            others = [place for _, place in rest]
            return [((old[0], place), {"a": name, "b": words}) for place, words in _moves(old[1], others, canvas)]
        others = [index for index in range(len(self.world.names)) if index not in dict([old, *rest])]
        return [((index, old[1]), {"a": name, "b": with_article(self.world.names[index])}) for index in others]

    def _recolored(
        self, old: Placed, rest: list[Placed], rng: random.Random
    ) -> list[tuple[Placed | None, dict[str, str]]]:
        """A shape in other colors; half of the time it is named by its shape alone, where no other has that."""
        if old[0] < self.world.num_emoji:
            return []
        names = self.world.names
        color, shape = names[old[0]].split()
        others = [names[index] for index, _ in rest]
        is_only = not any(other.endswith(f" {shape}") for other in others)
        called = shape if is_only and rng.random() < 0.5 else names[old[0]]
        colors = [new for new in COLORS if new != color and f"{new} {shape}" not in others]
        return [((names.index(f"{new} {shape}"), old[1]), {"a": called, "b": new}) for new in colors]

    def _is_of(self, split: str, edit: Edit) -> bool:
        is_told = any(bool(self.world.test_pairs[a, b]) for a, b in combinations(edit.objects, 2))
        if len(edit.objects) == 1:
            (index,), ((_, place),) = edit.objects, edit.target
            is_told = is_held_out(f"{self.world.names[index]} moves {_place_of(place, edit.canvas)}")
        if split == "test":
            return is_told
        pictures = (source_scenes([edit]), target_scenes([edit]))
        return not is_told and not any(bool(self.world.is_test(scenes)) for scenes in pictures)

    def samples(
        self,
        num_samples: int,
        generator: torch.Generator,
        *,
        drop_prompt: float = 0.0,
        copy_share: float = 0.0,
        color_field_share: float = 0.0,
        **options,
    ) -> list[Sample]:
        """A picture and an instruction from the user, the edited picture from the assistant; `options` as in `sample`.

        Args:
            drop_prompt: share of empty instructions without the picture, for guidance.
            copy_share: share of empty instructions with the picture, which ask for the same picture: the other branch of guidance,
                and what teaches to look at the source at all.
            color_field_share: share of edits on `color_fields`, which only the source tells.
        """
        edits = self.sample(num_samples, generator, **options)
        sources, targets = self.world.render(source_scenes(edits)), self.world.render(target_scenes(edits))
        draws, samples = torch.rand(num_samples, generator=generator).tolist(), []
        if color_field_share:
            chosen = torch.rand(num_samples, generator=generator) < color_field_share
            chosen &= torch.tensor(draws) >= drop_prompt  # guidance starts from pictures of the world
            fields = color_fields(num_samples, canvas_of(edits), generator)
            for pictures, scenes in ((sources, source_scenes(edits)), (targets, target_scenes(edits))):
                pictures[chosen] = self.world.render(scenes, fields)[chosen]
        for edit, source, target, draw in zip(edits, sources, targets, draws):
            is_dropped, is_copy = draw < drop_prompt, drop_prompt <= draw < drop_prompt + copy_share
            parts = {"text": "" if is_dropped or is_copy else edit.instruction, "image": source}
            kinds = ("text",) if is_dropped else TASKS["edit"].user
            turns = [("user", parts[kind]) for kind in kinds]
            samples.append(chat("edit", [*turns, ("assistant", source if is_copy else target)]))
        return samples


def edit_corpus() -> list[str]:
    """Texts with every word that is said in edits besides those of `ToyLanguage.corpus`, for a tokenizer."""
    forms = [form.format(a="cat", b="a dog") for train, test in FORMS.values() for form in (*train, *test)]
    return [*forms, "in the top left", "to the middle, to the left, to the right, to the top, to the bottom"]


def check_edit(checker: ToyChecker, pixel_values: Tensor, edit: Edit) -> EditVerdict:
    """How well a picture (3, H, W) in [-1, 1] follows an edit. Raises ValueError for a picture of another size."""
    if tuple(pixel_values.shape) != (3, *edit.canvas):
        raise ValueError(f"A picture after the edit is {(3, *edit.canvas)}, got {tuple(pixel_values.shape)}.")
    found, expected = checker.detect(pixel_values), dict(edit.target)
    is_followed = sorted(index for index, _ in found) == sorted(expected) and all(
        abs(a - b) <= TOLERANCE for index, place in found for a, b in zip(place, expected[index])
    )
    outside = ~edited_regions([edit])[0]
    source = checker.world.render(source_scenes([edit]))[0]
    kept, shown = (pixels[:, outside][None, :, None] for pixels in (source, pixel_values))  # (1, 3, 1, n)
    return EditVerdict(is_followed, psnr(shown, kept).item())


def _choose_form(kind: str, wording: str, rng: random.Random) -> str:
    if wording == "test":
        return rng.choice(FORMS[kind][1])
    return rng.choice(REQUESTS[kind] if rng.random() < 0.5 else FORMS[kind][0])


def _where(
    place: tuple[int, int],
    others: list[tuple[str, tuple[int, int]]],
    canvas: tuple[int, int],
    wording: str,
    rng: random.Random,
) -> str:
    """ "in the top left"; half of the time "left of the apple", where there is another object in the same row or column."""
    next_to = [(relation, name) for name, other in others if (relation := _relation(place, other))]
    if next_to and rng.random() < 0.5:
        relation, name = rng.choice(next_to)
        train, test = PHRASINGS["relation"]
        phrasings = test if wording == "test" else (PLAIN,) if rng.random() < 0.5 else train
        return f"{rng.choice(phrasings).relations[RELATIONS.index(relation)]} the {name}"
    where = _place_of(place, canvas)
    return f"in the {where}" if where.startswith(("top", "bottom")) else where


def _relation(place: tuple[int, int], other: tuple[int, int]) -> str | None:
    """Which of `RELATIONS` a place has to another one in its row or column."""
    if place[1] == other[1]:
        return "left of" if place[0] < other[0] else "right of"
    if place[0] == other[0]:
        return "above" if place[1] < other[1] else "below"
    return None


def _moves(
    place: tuple[int, int], others: list[tuple[int, int]], canvas: tuple[int, int]
) -> list[tuple[tuple[int, int], str]]:
    """Where an object can go, and in words: to a corner or the middle, or as far as it goes in one direction."""
    (x, y), (columns, rows), size = place, columns_and_rows(canvas), sprite_size(canvas)
    corners = [(column, row) for column in columns[::2] for row in rows[::2]]
    moves = [(corner, f"to the {_place_of(corner, canvas)}") for corner in corners]
    moves += [((columns[1], rows[1]), "to the middle")]
    moves += [((columns[0], y), "to the left"), ((columns[2], y), "to the right")]
    moves += [((x, rows[0]), "to the top"), ((x, rows[2]), "to the bottom")]
    return [(to, words) for to, words in moves if to != place and not any(_overlaps(to, at, size) for at in others)]


def _place_of(place: tuple[int, int], canvas: tuple[int, int]) -> str:
    return place_of(tuple(at + sprite_size(canvas) // 2 for at in place), canvas)


def _overlaps(place: tuple[int, int], other: tuple[int, int], size: int) -> bool:
    return all(abs(a - b) < size for a, b in zip(place, other))
