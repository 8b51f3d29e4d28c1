"""What is said about the toy world, against an independent reading of the scenes."""

import random
import re
from collections import Counter, defaultdict

import pytest
import torch

from hydra_hf.data.sample import Sample
from hydra_hf.data.tasks import TASKS
from hydra_hf.toy.language import (
    CATEGORIES,
    QUESTION_TYPES,
    TRAINING_TYPES,
    ToyLanguage,
    place_of,
)
from hydra_hf.toy.phrasing import KINDS, NUMBERS, PHRASINGS, PLAIN, fits, plural, with_article
from hydra_hf.toy.world import CANVASES, Scenes, ToyWorld, places_on, sprite_size


PLACES = {
    ("first", "first"): "top left", ("first", "middle"): "at the top", ("first", "last"): "top right",
    ("middle", "first"): "on the left", ("middle", "middle"): "in the middle", ("middle", "last"): "on the right",
    ("last", "first"): "bottom left", ("last", "middle"): "at the bottom", ("last", "last"): "bottom right",
}  # fmt: skip


@pytest.fixture(scope="module")
def language():
    return ToyLanguage(ToyWorld())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def things(world: ToyWorld, scenes: Scenes, index: int) -> list[tuple[str, float, float, float]]:
    """(name, x and y of the centre, distance) of each object."""
    rows = zip(scenes.objects[index], scenes.positions[index], scenes.sizes[index], scenes.distances[index])
    return [(world.names[o], float(p[0] + s / 2), float(p[1] + s / 2), float(d)) for o, p, s, d in rows if o >= 0]


def seen_place(x: float, y: float) -> str:
    column, row = (("first", "middle", "last")[1 + (at > 40) - (at < 24)] for at in (x, y))
    return PLACES[row, column]


def described(answer: str, seen: list[tuple[str, float, float, float]]) -> str:
    """The parts of a true description in the order of `answer`, which is free."""
    parts = [f"{with_article(name)} {'near' if d == 1 else 'far'} {seen_place(x, y)}" for name, x, y, d in seen]
    parts.sort(key=answer.find)
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def recomputed_answer(question: str, answer: str, seen: list[tuple[str, float, float, float]]) -> str:
    """The answer read from the sentence and the list of things; fails where either is ambiguous."""
    names = [name for name, *_ in seen]

    def only(name: str):
        (thing,) = [thing for thing in seen if thing[0] == name]
        return thing

    if question == "what is in the picture?":
        (name,) = names
        return name
    if match := re.fullmatch(r"what is (?:on|at) the (left|right|top|bottom)\?", question):
        axis, pick = {"left": (1, min), "right": (1, max), "top": (2, min), "bottom": (2, max)}[match[1]]
        assert len({thing[axis] for thing in seen}) == len(seen)
        return pick(seen, key=lambda thing: thing[axis])[0]
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        (name,) = [name for name in names if name.endswith(f" {match[1]}")]
        return name.split()[0]
    if question == "how many objects are there?":
        return NUMBERS[len(names)]
    if match := re.fullmatch(r"how many (.+) are there\?", question):
        return NUMBERS[sum(plural(name) == match[1] for name in names)]
    if match := re.fullmatch(r"is there (.+)\?", question):
        return "yes" if match[1] in [with_article(name) for name in names] else "no"
    if match := re.fullmatch(r"is the (.+) left or right of the (.+)\?", question):
        return "left" if only(match[1])[1] < only(match[2])[1] else "right"
    if match := re.fullmatch(r"is the (.+) above or below the (.+)\?", question):
        return "above" if only(match[1])[2] < only(match[2])[2] else "below"
    if match := re.fullmatch(r"is the (.+) near or far\?", question):
        return {1.0: "near", 2.0: "far"}[only(match[1])[3]]
    if match := re.fullmatch(r"where is the (.+)\?", question):
        return seen_place(*only(match[1])[1:3])
    if question == "what do you see?":
        return described(answer, seen)
    match = re.fullmatch(r"which is nearer, the (.+) or the (.+)\?", question)
    assert only(match[1])[3] != only(match[2])[3]
    return min(only(match[1]), only(match[2]), key=lambda thing: thing[3])[0]


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_answers_are_true_of_the_scene(difficulty):
    language = ToyLanguage(ToyWorld(difficulty))
    scenes, questions = language.sample_questions(1500, seeded())
    assert {question.type for question in questions} == set(QUESTION_TYPES)
    weights = {"place": 1, "distance": 1, "count": 1}  # of which any scene allows some
    questions[:300] = [
        language.questions(scenes, index, 1, random.Random(index), weights=weights)[0] for index in range(300)
    ]
    assert {question.type for question in questions[:300]} == set(weights)
    for index, question in enumerate(questions):
        seen = things(language.world, scenes, index)
        assert question.answer == recomputed_answer(question.question, question.answer, seen), (question, seen)


def test_answers_are_true_of_scattered_scenes(language):
    scenes = language.world.sample_scenes(1000, seeded(), scattered=1.0)
    rng = random.Random(0)
    for index in range(len(scenes)):
        (question,) = language.questions(scenes, index, 1, rng, weights=dict.fromkeys(TRAINING_TYPES, 1))
        seen = things(language.world, scenes, index)
        assert question.answer == recomputed_answer(question.question, question.answer, seen), (question, seen)


def test_the_commonest_answer_of_a_type_is_a_poor_guess(language):
    _, questions = language.sample_questions(3000, seeded(), split="test")
    answers = defaultdict(Counter)
    for question in questions:
        answers[question.type][question.answer] += 1
    share = {name: max(counter.values()) / counter.total() for name, counter in answers.items()}
    limits = {
        "exist": 0.57,
        "horizontal": 0.57,
        "vertical": 0.57,
        "count": 0.47,
        "color": 0.3,
        "what": 0.15,
        "nearer": 0.15,
    }
    assert all(share[name] < limit for name, limit in limits.items()), share


def test_naming_the_first_of_two_does_not_answer_which_is_nearer(language):
    _, questions = language.sample_questions(4000, seeded())
    nearer = [question for question in questions if question.type == "nearer"]
    is_first = [question.question.startswith(f"which is nearer, the {question.answer} or") for question in nearer]
    assert 0.4 < sum(is_first) / len(is_first) < 0.6


def split_key(prompt) -> tuple:
    """What decides the split of a prompt, read off the prompt itself."""
    if prompt.category in ("single_object", "colors"):
        return "single", prompt.text
    if prompt.category == "counting":
        return "counting", prompt.objects
    return "pair", tuple(sorted(prompt.objects))


def test_no_key_of_a_test_prompt_occurs_in_training(language):
    train, _ = language.sample_prompts(5000, seeded())
    test, _ = language.sample_prompts(1000, seeded(1), split="test")
    assert not {split_key(prompt) for prompt in train} & {split_key(prompt) for prompt in test}


def test_every_bare_single_object_is_a_training_prompt(language):
    prompts, _ = language.sample_prompts(3000, seeded(), categories=("single_object", "colors"))
    assert {with_article(name) for name in language.world.names} <= {prompt.text for prompt in prompts}
    test, _ = language.sample_prompts(500, seeded(), split="test", categories=("single_object", "colors"))
    assert not {with_article(name) for name in language.world.names} & {prompt.text.lower() for prompt in test}


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_scene_of_a_prompt_is_what_its_text_says(language, category, split):
    prompts, scenes = language.sample_prompts(100, seeded(), split=split, categories=(category,), phrasings=("plain",))
    for index, prompt in enumerate(prompts):
        assert prompt.category == category
        seen = things(language.world, scenes, index)
        names = [name for name, *_ in seen]
        assert tuple(language.world.names.index(name) for name in names) == prompt.objects
        if category == "counting":
            assert prompt.text == f"{NUMBERS[len(names)]} {plural(names[0])}"
            assert len(set(names)) == 1
        elif category == "position":
            first, second = re.split(" left of | right of | above | below ", prompt.text)
            a, b = (next(thing for thing in seen if with_article(thing[0]) == name) for name in (first, second))
            truth = {"left of": a[1] < b[1], "right of": a[1] > b[1], "above": a[2] < b[2], "below": a[2] > b[2]}
            assert truth[prompt.relation]
            assert f" {prompt.relation} " in prompt.text
        else:
            assert prompt.text == " and ".join(with_article(name) for name in names)
    if category == "color_attribution":
        pairs = [[language.world.names[i].split() for i in prompt.objects] for prompt in prompts]
        assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairs)


def test_the_middle_of_the_layout_is_the_middle_in_words_on_every_canvas():
    for canvas in CANVASES:
        centers = (places_on(canvas) + sprite_size(canvas) // 2).tolist()
        assert place_of(centers[0][0], canvas) == "in the middle"
        assert [place_of(center, canvas) for center in centers[3]] == [
            "top left",
            "top right",
            "bottom left",
            "bottom right",
        ]
        assert [place_of(center, canvas) for center in centers[4][:2]] == ["at the top", "at the bottom"]


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def said_by(phrasing) -> str:
    """One text with everything that a phrasing adds to the names."""
    phrases = [phrasing.one("cat"), phrasing.several(2, "cat"), *phrasing.relations]
    return " ".join(phrasing.text(phrase) for phrase in phrases)


def test_there_are_ten_kinds_of_phrasing_and_none_says_in_training_what_is_held_out():
    assert len(PHRASINGS) == 10
    forms = [form for train, test in PHRASINGS.values() for form in (*train, *test)]
    assert len(set(forms)) == len(forms)
    known = {word for train, _ in PHRASINGS.values() for form in (PLAIN, *train) for word in words_of(said_by(form))}
    for train, test in PHRASINGS.values():
        assert len(train) >= 3 <= len(test) + 1
        said = {form.text(form.one("cat")) + form.several(2, "cat") + str(form.relations) for form in train}
        for form in test:
            assert form.text(form.one("cat")) + form.several(2, "cat") + str(form.relations) not in said
            assert set(words_of(said_by(form))) <= known, form  # single words are known


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_a_kind_are_in_its_forms_and_a_test_prompt_in_none_of_training(language, kind):
    """Read back by pattern, from names alone."""
    names = "|".join(sorted(map(re.escape, language.world.names), key=len, reverse=True))
    plurals = "|".join(sorted((re.escape(plural(name)) for name in language.world.names), key=len, reverse=True))
    hollow = re.compile(rf"\b(?:{plurals}|{names})\b", re.IGNORECASE)

    def shapes(split: str) -> set[str]:
        prompts, _ = language.sample_prompts(400, seeded(), split=split, phrasings=(kind,))
        assert all(fits(kind, prompt.category) for prompt in prompts)
        # the name of an object of which there is one after "a" or "an" says no more than the article does
        return {re.sub(r"\b(an?|An?|AN?) \*", "a *", hollow.sub("*", prompt.text)) for prompt in prompts}

    train, test = shapes("train"), shapes("test")
    if kind == "plain":
        assert test <= train
    elif kind == "plural":  # two dog and two dogs are one shape
        assert not {shape for shape in test if shape in train and not shape.startswith(tuple(NUMBERS))}
    else:
        assert not train & test


def test_plain_captions_are_half_of_what_training_says(language):
    prompts, _ = language.sample_prompts(2000, seeded(), categories=("two_objects",))
    plain = [" and ".join(with_article(language.world.names[index]) for index in prompt.objects) for prompt in prompts]
    assert 0.45 < sum(prompt.text == text for prompt, text in zip(prompts, plain)) / len(prompts) < 0.55


def test_phrasings_that_fit_no_category_or_do_not_exist_are_errors(language):
    with pytest.raises(ValueError, match="fit none of"):
        language.sample_prompts(1, seeded(), phrasings=("relation",), categories=("counting",))
    with pytest.raises(ValueError, match="rude"):
        language.sample_prompts(1, seeded(), phrasings=("rude",))


def test_a_word_that_nobody_knows_replaces_one_object_in_the_text_alone(language):
    prompts, scenes = language.sample_prompts(300, seeded(), unknown_share=1.0)
    for prompt, objects in zip(prompts, scenes.objects.tolist()):
        unknown = [word for word in re.findall(r"\w+", prompt.text.lower()) if word not in language.known_words]
        assert len(unknown) == 1
        assert tuple(index for index in objects if index >= 0) == prompt.objects
    known, _ = language.sample_prompts(300, seeded())
    assert not {word for prompt in known for word in re.findall(r"\w+", prompt.text.lower())} - language.known_words


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cat", "cats"), ("strawberry", "strawberries"), ("fish", "fish"), ("bus", "buses"), ("fox", "foxes"),
     ("key", "keys"), ("cherry", "cherries"), ("butterfly", "butterflies"), ("red circle", "red circles")],
)  # fmt: skip
def test_plurals_are_english(name, expected):
    assert plural(name) == expected


def test_every_word_that_is_said_is_in_the_corpus():
    for difficulty in (1, 2):
        language = ToyLanguage(ToyWorld(difficulty))
        known = set(re.findall(r"\w+|[^\w\s]", " ".join(language.corpus()).lower()))
        samples = language.generate_samples(400, seeded()) + language.understand_samples(200, seeded(), 4)
        parts = [part for sample in samples for message in sample.messages for part in message["content"]]
        said = {
            word
            for part in parts
            if part["type"] == "text"
            for word in re.findall(r"\w+|[^\w\s]", part["text"].lower())
        }
        assert said <= known
        assert language.corpus() == ToyLanguage(ToyWorld(difficulty)).corpus()


def test_generated_picture_is_the_assistants_and_understood_picture_the_users(language):
    (drawn,) = language.generate_samples(1, seeded())
    assert [(m["role"], [part["type"] for part in m["content"]]) for m in drawn.messages] == [
        ("user", ["text"]), ("assistant", ["image"]),
    ]  # fmt: skip
    (asked,) = language.understand_samples(1, seeded(), 1)
    assert [(m["role"], [part["type"] for part in m["content"]]) for m in asked.messages] == [
        ("user", ["image", "text"]), ("assistant", ["text"]),
    ]  # fmt: skip


def test_nothing_is_asked_twice_of_one_picture(language):
    lengths = set()
    for sample in language.understand_samples(200, seeded(), 4):
        asked = [message["content"][-1]["text"] for message in sample.messages[::2]]
        assert len(asked) == len(set(asked))
        assert [message["role"] for message in sample.messages] == ["user", "assistant"] * len(asked)
        lengths.add(len(asked))
    assert max(lengths) == 4


def test_only_what_has_a_weight_is_asked_and_a_scene_without_it_is_described(language):
    samples = language.understand_samples(200, seeded(), 3, weights={"nearer": 1})
    asked = {message["content"][-1]["text"] for sample in samples for message in sample.messages[::2]}
    assert "what do you see?" in asked
    assert all(text.startswith("which is nearer") for text in asked - {"what do you see?"})
    with pytest.raises(ValueError, match="further"):
        language.understand_samples(1, seeded(), 1, weights={"further": 1})


def test_dropped_prompts_are_empty_at_the_given_rate(language):
    samples = language.generate_samples(500, seeded(), drop_prompt=0.2)
    empty = sum(sample.messages[0]["content"][0]["text"] == "" for sample in samples)
    assert 70 < empty < 130


def test_equal_seeds_say_the_same(language):
    first, second, third = (language.sample_prompts(50, seeded(seed))[0] for seed in (1, 1, 2))
    assert first == second != third
    assert language.sample_questions(50, seeded())[1] == language.sample_questions(50, seeded())[1]


def test_unknown_category_split_and_task_are_errors(language):
    with pytest.raises(ValueError, match="categories"):
        language.sample_prompts(1, seeded(), categories=("colour",))
    with pytest.raises(ValueError, match="split"):
        language.sample_prompts(1, seeded(), split="validation")
    with pytest.raises(ValueError, match="task"):
        Sample(task="draw", messages=[])
    assert len(TASKS) == len(set(TASKS)) == 10
