"""What is said about the toy world: captions, prompts in six categories after GenEval, questions and answers."""

import random
from dataclasses import dataclass
from functools import cached_property

import torch

from hydra_hf.data.prompts import PROMPTS
from hydra_hf.data.sample import Sample

from .phrasing import (
    NUMBERS,
    ONLY_OF,
    PHRASINGS,
    PLAIN,
    RELATIONS,
    Phrasing,
    fits,
    phrasings_of,
    plural,
    with_article,
)
from .text_tokenizer import words_of
from .world import CANVAS, COLORS, MAX_OBJECTS, NEAR, SHAPES, Scenes, ToyWorld, check_split, is_held_out


CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
QUESTION_TYPES = ("what", "color", "count", "exist", "horizontal", "vertical", "nearer")
PAINTED = {
    "reconstruct": "render",
    "depth": "render_depth",
    "segment": "render_segmentation",
}  # task -> the method of `ToyWorld` that makes its images
TRAINING_TYPES = (*QUESTION_TYPES, "place", "distance", "describe")  # the last three teach what the others need


@dataclass(frozen=True)
class Prompt:
    """`objects` are in reading order; `relation` is that of the object named first to the second, in the category position."""

    category: str
    text: str
    objects: tuple[int, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Question:
    """One question about a scene and its only answer."""

    type: str
    question: str
    answer: str


def place_of(center: tuple[int, int], canvas: tuple[int, int] = CANVAS) -> str:
    """Where an object with this center (x, y) on a canvas (height, width) is, in words."""
    shares = (at / side for at, side in zip(center, reversed(canvas)))
    column, row = (0 if share < 3 / 8 else 2 if share > 5 / 8 else 1 for share in shares)
    if row == column == 1:
        return "in the middle"
    if row == 1:
        return ("on the left", "", "on the right")[column]
    if column == 1:
        return ("at the top", "", "at the bottom")[row]
    return f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}"


class ToyLanguage:
    """Everything that can be said about a world. All randomness comes from the caller's generator."""

    def __init__(self, world: ToyWorld):
        self.world = world
        self.shape_ids = {name: i + world.num_emoji for i, name in enumerate(world.shape_names)}

    # Prompts

    def sample_prompts(
        self,
        num_prompts: int,
        generator: torch.Generator,
        *,
        split: str = "train",
        categories: tuple[str, ...] = CATEGORIES,
        phrasings: tuple[str, ...] | None = None,
        unknown_share: float = 0.0,
        canvas: tuple[int, int] = CANVAS,
    ) -> tuple[list[Prompt], Scenes]:
        """Prompts of one split, and for each a scene that matches it; only the background is left open.

        Args:
            phrasings: kinds of `phrasing.KINDS`, each in the forms of the split. None is plain captions and all other
                kinds, half and half, in the forms of training, with kinds for a single category more often.
            unknown_share: how often an unknown word replaces an object in the text, but not in the scene.

        Raises ValueError for an unknown split, category or kind, and if no kind fits a category.
        """
        check_split(split)
        if unknown := set(categories) - set(CATEGORIES):
            raise ValueError(f"categories {sorted(unknown)} are not among {CATEGORIES}.")
        if phrasings and not any(fits(kind, category) for kind in phrasings for category in categories):
            raise ValueError(f"{phrasings=} fit none of {categories=}.")
        rng = random_from(generator)
        prompts = []
        while len(prompts) < num_prompts:
            category = rng.choice(categories)
            phrasing = self._choose_phrasing(category, phrasings, split, rng)
            if phrasing is None:
                continue
            prompt = self._propose_prompt(category, phrasing, unknown_share, rng)
            if self._is_test(prompt, is_new=split == "test" and phrasings is not None) == (split == "test"):
                prompts.append(prompt)
        scenes = self.scenes_of(prompts, generator, canvas)
        while (
            split == "train" and (held_out := self.world.is_test(scenes)).any()
        ):  # the other task must not see their images
            scenes = self.scenes_of(prompts, generator, canvas).where(held_out, scenes)
        return prompts, scenes

    def _choose_phrasing(
        self, category: str, kinds: tuple[str, ...] | None, split: str, rng: random.Random
    ) -> Phrasing | None:
        """A phrasing for the category, None if no kind fits it."""
        if kinds is None:
            split = "train"
            kinds = (*PHRASINGS, *3 * tuple(ONLY_OF)) if rng.random() < 0.5 else ("plain",)
        kinds = [kind for kind in kinds if fits(kind, category)]
        return rng.choice(phrasings_of(rng.choice(kinds), split)) if kinds else None

    def _propose_prompt(self, category: str, phrasing: Phrasing, unknown_share: float, rng: random.Random) -> Prompt:
        world, relation = self.world, None
        if category in ("single_object", "colors"):
            objects = (
                world.names.index(rng.choice(world.emoji_names if category == "single_object" else world.shape_names)),
            )
        elif category == "counting":
            objects = (rng.randrange(len(world.names)),) * rng.randint(2, MAX_OBJECTS)
        else:
            objects = self._sample_pair(category, rng)
        names = [world.names[index] for index in objects]
        if rng.random() < unknown_share:
            names[0 if category == "counting" else rng.randrange(len(names))] = self.unknown_word(rng)
        if category == "counting":
            phrase = phrasing.several(len(objects), names[0])
        elif len(names) == 1:
            phrase = phrasing.one(names[0])
        else:
            relation = rng.choice(RELATIONS) if category == "position" else None
            link = "and" if relation is None else phrasing.relations[RELATIONS.index(relation)]
            phrase = f"{phrasing.one(names[0])} {link} {phrasing.one(names[1])}"
        objects = objects[::-1] if relation in ("right of", "below") else objects  # in reading order
        return Prompt(category, phrasing.text(phrase), objects, relation)

    def _sample_pair(self, category: str, rng: random.Random) -> tuple[int, int]:
        world = self.world
        pool = range(world.num_emoji if category == "color_attribution" else 0, len(world.names))
        first, second = rng.sample(pool, 2)
        while category == "color_attribution" and not self._differ_in_color_and_shape(first, second):
            first, second = rng.sample(pool, 2)
        return first, second

    def _is_test(self, prompt: Prompt, is_new: bool) -> bool:
        """Whether a prompt is of the test split. For one object only the wording is held out, and always if `is_new`."""
        first, *others = prompt.objects
        if prompt.category == "counting":
            return bool(self.world.test_counts[first, len(prompt.objects)])
        if others:
            return bool(self.world.test_pairs[first, others[0]])
        text = prompt.text.lower()  # as the text tokenizer reads it
        return is_new or (text != PLAIN.one(self.world.names[first]) and is_held_out(text, share=4))

    def unknown_word(self, rng: random.Random) -> str:
        """A pronounceable word that means nothing."""
        while True:
            syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
            word = "".join(syllables) + rng.choice(["", "n", "r", "l", "s", "x", "t", "ph", "nt", "mp"])
            if word not in self.known_words and len(word) > 2:
                return word

    @cached_property
    def known_words(self) -> frozenset[str]:
        """Every word of the corpus, in lower case."""
        return frozenset(words_of(self.corpus()))

    def _differ_in_color_and_shape(self, first: int, second: int) -> bool:
        return all(a != b for a, b in zip(self.world.names[first].split(), self.world.names[second].split()))

    def scenes_of(self, prompts: list[Prompt], generator: torch.Generator, canvas: tuple[int, int] = CANVAS) -> Scenes:
        """Scenes of near objects in the layout that the prompts ask for."""
        objects = torch.tensor([[*prompt.objects, *[-1] * (MAX_OBJECTS - len(prompt.objects))] for prompt in prompts])
        is_column = torch.tensor([prompt.relation in ("above", "below") for prompt in prompts])
        distances = torch.full(objects.shape, NEAR)
        return self.world.arrange(objects, is_column, distances, generator, canvas=canvas)

    # Questions

    def questions(
        self,
        scenes: Scenes,
        index: int,
        num_questions: int,
        rng: random.Random,
        *,
        weights: dict[str, int] | None = None,
    ) -> list[Question]:
        """Questions about scene `index`, of the types that fit it, as often as `weights` says; None is `QUESTION_TYPES` equally.

        Raises ValueError for types that are not among `TRAINING_TYPES`.
        """
        weights = dict.fromkeys(QUESTION_TYPES, 1) if weights is None else weights
        if unknown := set(weights) - set(TRAINING_TYPES):
            raise ValueError(f"questions of type {sorted(unknown)} are not among {TRAINING_TYPES}.")
        scene = _SceneFacts(self.world, scenes, index)
        makers = {name: getattr(self, f"_ask_{name}") for name in weights}
        possible = [name for name, maker in makers.items() if maker(scene, random.Random(0)) is not None]
        if not possible:
            return []
        types = rng.choices(possible, [weights[name] for name in possible], k=num_questions)
        return [makers[name](scene, rng) for name in types]

    def _ask_describe(self, scene: "_SceneFacts", rng: random.Random) -> Question:
        """All objects in any order: "a red circle far on the right and a cat near on the left".

        The name comes first, so that the model has to look up distance and place by the name.
        """
        parts = [
            f"{with_article(name)} {'near' if distance == NEAR else 'far'} {place_of(center, scene.canvas)}"
            for name, distance, center in zip(scene.names, scene.distances, scene.centers)
        ]
        rng.shuffle(parts)
        answer = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        return Question("describe", "what do you see?", answer)

    def _ask_what(self, scene: "_SceneFacts", rng: random.Random) -> Question | None:
        if len(scene.names) == 1:
            return Question("what", "what is in the picture?", scene.names[0])
        if scene.axis is None:
            return None
        places = (("on the left", "on the right"), ("at the top", "at the bottom"))[scene.axis]
        which = rng.randrange(2)
        return Question("what", f"what is {places[which]}?", scene.names[which])

    def _ask_color(self, scene: "_SceneFacts", rng: random.Random) -> Question | None:
        shapes = [name.split() for name in scene.names if name in self.shape_ids]
        unique = [(color, shape) for color, shape in shapes if [s for _, s in shapes].count(shape) == 1]
        if not unique:
            return None
        color, shape = rng.choice(unique)
        return Question("color", f"what color is the {shape}?", color)

    def _ask_count(self, scene: "_SceneFacts", rng: random.Random) -> Question | None:
        kind = rng.random()
        if kind < 0.3:
            return Question("count", "how many objects are there?", NUMBERS[len(scene.names)])
        name = rng.choice(self.world.names if kind < 0.45 else scene.names)
        return Question("count", f"how many {plural(name)} are there?", NUMBERS[scene.names.count(name)])

    def _ask_exist(self, scene: "_SceneFacts", rng: random.Random) -> Question | None:
        if rng.random() < 0.5:
            name = rng.choice(scene.names)
        else:
            name = rng.choice([name for name in self.world.names if name not in scene.names])
        return Question("exist", f"is there {with_article(name)}?", "yes" if name in scene.names else "no")

    def _ask_place(self, scene: "_SceneFacts", rng: random.Random) -> Question | None:
        places = [place_of(center, scene.canvas) for center in scene.centers]
        return self._ask_of_one("place", "where is the {}?", places, scene, rng)

    def _ask_distance(self, scene: "_SceneFacts", rng: random.Random) -> Question | None:
        answers = ["near" if distance == NEAR else "far" for distance in scene.distances]
        return self._ask_of_one("distance", "is the {} near or far?", answers, scene, rng)

    def _ask_of_one(self, kind: str, question: str, answers: list[str], scene: "_SceneFacts", rng: random.Random):
        """A question about an object that is the only one of its name, None if there is none; `answers` are those for every
        object."""
        unique = [i for i, name in enumerate(scene.names) if scene.names.count(name) == 1]
        if not unique:
            return None
        which = rng.choice(unique)
        return Question(kind, question.format(scene.names[which]), answers[which])

    def _ask_horizontal(self, scene: "_SceneFacts", rng: random.Random) -> Question | None:
        return self._ask_side("horizontal", 0, ("left", "right of"), scene, rng)

    def _ask_vertical(self, scene: "_SceneFacts", rng: random.Random) -> Question | None:
        return self._ask_side("vertical", 1, ("above", "below"), scene, rng)

    def _ask_side(self, kind: str, axis: int, words: tuple[str, str], scene: "_SceneFacts", rng: random.Random):
        pairs = scene.pairs(lambda a, b: abs(scene.centers[a][axis] - scene.centers[b][axis]) > 12)
        if not pairs:
            return None
        a, b = rng.choice(pairs)
        question = f"is the {scene.names[a]} {words[0]} or {words[1]} the {scene.names[b]}?"
        is_first = scene.centers[a][axis] < scene.centers[b][axis]
        return Question(kind, question, words[0 if is_first else 1].split()[0])

    def _ask_nearer(self, scene: "_SceneFacts", rng: random.Random) -> Question | None:
        pairs = scene.pairs(lambda a, b: scene.distances[a] != scene.distances[b])
        if not pairs:
            return None
        a, b = rng.choice(pairs)
        nearer = a if scene.distances[a] < scene.distances[b] else b
        question = f"which is nearer, the {scene.names[a]} or the {scene.names[b]}?"
        return Question("nearer", question, scene.names[nearer])

    # Samples

    def generate_samples(
        self,
        num_samples: int,
        generator: torch.Generator,
        *,
        max_objects: int = MAX_OBJECTS,
        drop_prompt: float = 0.0,
        unknown_share: float = 0.0,
        split: str = "train",
        canvas: tuple[int, int] = CANVAS,
    ) -> list[Sample]:
        """Text-to-image samples; the prompt is empty with probability `drop_prompt`, see `sample_prompts` for the rest."""
        categories = CATEGORIES if max_objects > 1 else ("single_object", "colors")
        prompts, scenes = self.sample_prompts(
            num_samples, generator, split=split, categories=categories, unknown_share=unknown_share, canvas=canvas
        )
        is_dropped = torch.rand(num_samples, generator=generator) < drop_prompt
        return [
            chat("generate", [("user", "" if dropped else prompt.text), ("assistant", image)])
            for prompt, image, dropped in zip(prompts, self.world.render(scenes), is_dropped.tolist())
        ]

    def understand_samples(
        self,
        num_samples: int,
        generator: torch.Generator,
        questions_per_image: int,
        *,
        max_objects: int = MAX_OBJECTS,
        weights: dict[str, int] | None = None,
        split: str = "train",
        canvas: tuple[int, int] = CANVAS,
    ) -> list[Sample]:
        """Conversations about one image each, of at most `questions_per_image` turns: nothing is asked twice.

        `weights` is as in `questions`; None is all of `TRAINING_TYPES`. A scene that none of them fits is described. Half of
        the scenes are scattered: otherwise the place of a single object would be known without looking.
        """
        scenes = self.world.sample_scenes(
            num_samples, generator, split=split, max_objects=max_objects, scattered=0.5, canvas=canvas
        )
        rng, samples = random_from(generator), []
        weights = dict.fromkeys(TRAINING_TYPES, 1) if weights is None else weights
        for index, image in enumerate(self.world.render(scenes)):
            asked = self.questions(scenes, index, questions_per_image, rng, weights=weights)
            asked = asked or self.questions(scenes, index, 1, rng, weights={"describe": 1})
            turns = {question.question: question.answer for question in asked}
            messages = [(role, text) for turn in turns.items() for role, text in zip(("user", "assistant"), turn)]
            samples.append(chat("understand", [("user", image), *messages]))
        return samples

    def paint_samples(
        self,
        task: str,
        num_samples: int,
        generator: torch.Generator,
        *,
        max_objects: int = MAX_OBJECTS,
        split: str = "train",
        canvas: tuple[int, int] = CANVAS,
    ) -> list[Sample]:
        """The user's turn is one of `PROMPTS` and an image, the assistant's the map that `task`, one of `PAINTED`, asks for."""
        scenes = self.world.sample_scenes(
            num_samples, generator, split=split, max_objects=max_objects, scattered=0.5, canvas=canvas
        )
        rng = random_from(generator)
        targets = getattr(self.world, PAINTED[task])(scenes)
        return [
            chat(task, [("user", rng.choice(PROMPTS[task])), ("user", image), ("assistant", target)])
            for image, target in zip(self.world.render(scenes), targets)
        ]

    def sample_questions(
        self, num_questions: int, generator: torch.Generator, *, split: str = "train"
    ) -> tuple[Scenes, list[Question]]:
        """Scenes of one split with one question each."""
        scenes = self.world.sample_scenes(num_questions, generator, split=split)
        rng = random_from(generator)
        return scenes, [self.questions(scenes, index, 1, rng)[0] for index in range(num_questions)]

    def corpus(self) -> list[str]:
        """Texts with every word that the toy world uses, for a tokenizer."""
        names = self.world.names
        texts = [with_article(name) for name in names] + [f"{n} {plural(name)}" for n in NUMBERS for name in names]
        for phrasing in (PLAIN, *(p for forms in PHRASINGS.values() for split in forms for p in split)):
            phrases = [phrasing.one("cat"), *(phrasing.several(count, "cat") for count in range(2, MAX_OBJECTS + 1))]
            phrases += [f"a cat {relation} a dog" for relation in (*phrasing.relations, "and")]
            texts += [phrasing.text(phrase) for phrase in phrases]
        texts += [f"what color is the {shape}? {color}" for shape in SHAPES for color in COLORS]
        texts += [
            "what is in the picture?", "what is on the left?", "what is on the right?", "what is at the top?",
            "what is at the bottom?", "how many objects are there?", "is there a cat? yes no",
            "where is the cat?", "is the dog near or far?",
            "is the cat left or right of the dog?", "is the cat above or below the dog?",
            "which is nearer, the cat or the dog?", "what do you see?",
            "a cat near in the middle, a dog far top left, top right, bottom left and bottom right",
        ]  # fmt: skip
        return texts


class _SceneFacts:
    """One scene in plain Python."""

    def __init__(self, world: ToyWorld, scenes: Scenes, index: int):
        objects = [i for i in scenes.objects[index].tolist() if i >= 0]
        self.names = [world.names[i] for i in objects]
        self.canvas = scenes.canvas
        self.distances = scenes.distances[index].tolist()
        half = (scenes.sizes[index, :, None] // 2).expand(-1, 2)
        self.centers = (scenes.positions[index] + half).tolist()
        self.axis = self._axis() if len(objects) == 2 else None

    def _axis(self) -> int | None:
        """0 for two objects in a row, 1 in a column, otherwise None."""
        is_apart = [abs(a - b) > 12 for a, b in zip(*self.centers[:2])]
        return is_apart.index(True) if sum(is_apart) == 1 else None

    def pairs(self, holds) -> list[tuple[int, int]]:
        """Ordered pairs of objects, each the only one of its name, for which `holds(a, b)`."""
        unique = [i for i, name in enumerate(self.names) if self.names.count(name) == 1]
        return [(a, b) for a in unique for b in unique if a != b and holds(a, b)]


def random_from(generator: torch.Generator) -> random.Random:
    """Python's generator, seeded from torch's, which cannot choose among strings."""
    return random.Random(int(torch.randint(2**62, (), generator=generator)))


def chat(task: str, turns: list[tuple[str, object]]) -> Sample:
    """Turns of text, images (3, H, W) or clips (3, T, H, W) as messages; neighbours of one role share a message."""
    messages: list[dict] = []
    for role, value in turns:
        kind = "text" if isinstance(value, str) else "image" if value.ndim == 3 else "video"
        part = {"type": kind, kind: value}
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"].append(part)
        else:
            messages.append({"role": role, "content": [part]})
    return Sample(task=task, messages=messages)
