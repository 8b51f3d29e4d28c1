"""Edits of the toy world: the target is what the instruction asks for, and nothing else changes."""

import json
import re
from dataclasses import replace

import pytest
import torch

from hydra_hf.data.collate import collate
from hydra_hf.toy.batches import ToyData
from hydra_hf.toy.checker import ToyChecker
from hydra_hf.toy.clips import clip_corpus
from hydra_hf.toy.edits import (
    EDIT_KINDS,
    FORMS,
    MANNERS,
    REQUESTS,
    Edit,
    ToyEdits,
    check_edit,
    edit_corpus,
    edited_regions,
    source_scenes,
    target_scenes,
)
from hydra_hf.toy.language import ToyLanguage
from hydra_hf.toy.phrasing import PHRASINGS, RELATIONS, with_article
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer
from hydra_hf.toy.world import PATCH, ToyWorld
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.recipes import tiny
from toy_models import toy_pipeline, toy_processor


NUM_EDITS = 20


@pytest.fixture(scope="module")
def world():
    return ToyWorld()


@pytest.fixture(scope="module")
def edits(world):
    return ToyEdits(world)


@pytest.fixture(scope="module")
def checker(world):
    return ToyChecker(world)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures_of(world: ToyWorld, sampled: list[Edit]) -> tuple[torch.Tensor, torch.Tensor]:
    return world.render(source_scenes(sampled)), world.render(target_scenes(sampled))


# The truth, read from the instruction


def change_of(world: ToyWorld, edit: Edit) -> tuple[dict, dict]:
    """Name -> place of what is only in the source, and only in the target."""
    before, after = ({world.names[index]: place for index, place in placed} for placed in (edit.source, edit.target))
    gone = {name: place for name, place in before.items() if after.get(name) != place}
    come = {name: place for name, place in after.items() if before.get(name) != place}
    return gone, come


def words_of_form(kind: str, instruction: str) -> set[tuple[str, ...]]:
    """What a form of the kind may have been filled with; more than one where one form is part of another."""
    found = set()
    for form in (*FORMS[kind][0], *FORMS[kind][1]):
        pattern = re.escape(form).replace(r"\{a\}", "(.+?)").replace(r"\{b\}", "(.+)")
        if match := re.fullmatch(pattern, instruction):
            found.add(match.groups())
    return found


@pytest.mark.parametrize("kind", EDIT_KINDS)
@pytest.mark.parametrize("wording", ["train", "test"])
def test_the_target_is_what_the_instruction_says(world, edits, kind, wording):
    relations = {
        form: relation
        for train_or_test in (((),), *PHRASINGS["relation"])
        for phrasing in train_or_test
        if phrasing
        for form, relation in zip(phrasing.relations, RELATIONS)
    } | dict(zip(RELATIONS, RELATIONS))
    for edit in edits.sample(60, seeded(), kinds=(kind,), wording=wording):
        gone, come = change_of(world, edit)
        fillings = words_of_form(kind, edit.instruction)
        assert fillings, edit.instruction
        if kind == "recolor":
            ((old, place),), ((new, new_place),) = gone.items(), come.items()
            color, shape = new.split()
            assert place == new_place
            assert old.split()[1] == shape
            assert fillings & {(old, color), (shape, color)}
            if (shape, color) in fillings:
                assert sum(world.names[index].endswith(f" {shape}") for index, _ in edit.source) == 1
        elif kind == "remove":
            ((old, _),) = gone.items()
            assert (old,) in fillings
            assert not come
        elif kind == "replace":
            ((old, place),), ((new, new_place),) = gone.items(), come.items()
            assert place == new_place
            assert (old, with_article(new)) in fillings
        elif kind == "add":
            ((new, place),) = come.items()
            assert not gone
            (where,) = {words[1] for words in fillings if words[0] == with_article(new)}
            if match := re.fullmatch(rf"({'|'.join(sorted(relations, key=len, reverse=True))}) the (.+)", where):
                other = dict(edit.source)[world.names.index(match[2])]
                (x, y), (other_x, other_y) = place, other
                truth = {"above": y < other_y, "below": y > other_y, "left of": x < other_x, "right of": x > other_x}
                assert truth[relations[match[1]]]
            else:
                assert place == place_called(where)
        else:
            ((old, place),), ((new, new_place),) = gone.items(), come.items()
            assert old == new
            (where,) = {words[1] for words in fillings if words[0] == old}
            sides = {"left": (0, place[1]), "right": (32, place[1]), "top": (place[0], 0), "bottom": (place[0], 32)}
            side = where.removeprefix("to the ")
            assert new_place == (sides[side] if side in sides else place_called(where))


def place_called(where: str) -> tuple[int, int]:
    """On 64 x 64 px: "in the top left" is (0, 0), "on the right" is (32, 16)."""
    words = where.split()
    x = 0 if "left" in words else 32 if "right" in words else 16
    y = 0 if "top" in words else 32 if "bottom" in words else 16
    return x, y


@pytest.mark.parametrize("canvas", [(64, 64), (48, 80), (128, 64)])
def test_outside_the_edited_region_nothing_changes_and_inside_something_does(world, edits, canvas):
    sampled = edits.sample(60, seeded(), canvas=canvas)
    source, target = pictures_of(world, sampled)
    regions = edited_regions(sampled)
    assert regions.shape == (60, *canvas)
    for before, after, region in zip(source, target, regions):
        assert torch.equal(before[:, ~region], after[:, ~region])
        assert not torch.equal(before[:, region], after[:, region])
        whole = region.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(2)
        assert torch.equal(whole.any(2), whole.all(2))  # whole patches


def test_kinds_are_as_frequent_and_equal_seeds_give_equal_edits(edits):
    sampled = edits.sample(500, seeded())
    counts = [sum(edit.kind == kind for edit in sampled) for kind in EDIT_KINDS]
    assert min(counts) > 70
    assert max(len(edit.source) for edit in sampled) == 4
    assert max(len(edit.target) for edit in edits.sample(100, seeded(), max_objects=2)) == 2
    assert edits.sample(20, seeded(1)) == edits.sample(20, seeded(1)) != edits.sample(20, seeded(2))


@pytest.mark.parametrize(
    "wrong", [{"split": "val"}, {"wording": "rude"}, {"kinds": ("rotate",)}, {"max_objects": 1}, {"canvas": (32, 32)}]
)
def test_a_wrong_sampling_argument_is_an_error(edits, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        edits.sample(1, seeded(), **wrong)


# Words and splits


def test_held_out_forms_say_nothing_new_but_the_combination():
    for kind, (train, test) in FORMS.items():
        assert len(train) + len(test) == len(MANNERS) * len(REQUESTS[kind])
        assert len(test) >= 3
        assert set(REQUESTS[kind]) <= set(train)
        assert not set(train) & set(test)
    shown = " ".join(form for train, _ in FORMS.values() for form in train)
    assert all(
        set(re.findall(r"\w+", form)) <= set(re.findall(r"\w+", shown)) for _, test in FORMS.values() for form in test
    )
    for manner in MANNERS:
        pattern = re.escape(manner).replace(r"\{\}", ".+")
        assert any(re.fullmatch(pattern, form) for train, _ in FORMS.values() for form in train)


def test_instructions_of_the_test_wording_are_in_no_form_of_training(edits):
    for edit in edits.sample(100, seeded(), wording="test"):
        patterns = (
            re.escape(form).replace(r"\{a\}", r"[\w ]+").replace(r"\{b\}", r"[\w ]+") for form in FORMS[edit.kind][1]
        )
        assert any(re.fullmatch(pattern, edit.instruction) for pattern in patterns)
    for edit in edits.sample(100, seeded(), wording="train"):
        patterns = (
            re.escape(form).replace(r"\{a\}", r"[\w ]+").replace(r"\{b\}", r"[\w ]+") for form in FORMS[edit.kind][0]
        )
        assert any(re.fullmatch(pattern, edit.instruction) for pattern in patterns)


def test_every_word_that_is_said_is_in_the_corpora_which_fit_the_vocabulary(world, edits):
    language = ToyLanguage(world)
    before = language.corpus()
    known = set(re.findall(r"\w+|[^\w\s]", " ".join(before + edit_corpus(world)).lower()))
    said = [edit.instruction for wording in ("train", "test") for edit in edits.sample(300, seeded(), wording=wording)]
    assert {word for text in said for word in re.findall(r"\w+|[^\w\s]", text)} <= known
    tokenizer = train_toy_tokenizer(before + clip_corpus(world) + edit_corpus(world))
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in known)
    assert language.corpus() == before


def test_no_pair_of_a_test_edit_occurs_in_training(world, edits):
    def pairs(edit: Edit) -> set:
        return {frozenset((a, b)) for a in edit.objects for b in edit.objects if a != b}

    train, test = edits.sample(800, seeded()), edits.sample(200, seeded(), split="test")
    held_out = {frozenset(pair) for pair in world.test_pairs.nonzero().tolist()}
    assert not any(pairs(edit) & held_out for edit in train)
    assert all(pairs(edit) & held_out for edit in test if len(edit.objects) > 1)
    lone = {(edit.source[0][0], edit.target[0][1]) for edit in train if len(edit.objects) == 1}
    assert not lone & {(edit.source[0][0], edit.target[0][1]) for edit in test if len(edit.objects) == 1}
    for scenes in (source_scenes(train), target_scenes(train)):
        assert not world.is_test(scenes).any()


# The checker


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_true_targets_pass_and_unedited_sources_and_other_targets_do_not(world, edits, checker, kind):
    sampled = edits.sample(NUM_EDITS, seeded(), kinds=(kind,), split="test")
    source, target = pictures_of(world, sampled)
    noisy = target + 0.1 * torch.randn(target.shape, generator=seeded())
    verdicts = [
        [check_edit(checker, picture, edit) for picture, edit in zip(pictures, sampled)]
        for pictures in (target, noisy, source, target.roll(1, dims=0))
    ]
    followed = [sum(verdict.is_followed for verdict in row) / NUM_EDITS for row in verdicts]
    assert followed[0] == 1
    assert followed[1] >= 0.95
    assert followed[2:] == [0, 0]
    assert all(verdict.psnr_outside == 100 for verdict in verdicts[0] + verdicts[2])
    assert all(20 < verdict.psnr_outside < 30 for verdict in verdicts[1])


def test_half_an_edit_and_damage_elsewhere_are_seen(world, edits, checker):
    for edit in edits.sample(NUM_EDITS, seeded(), kinds=("move",)):
        ((index, old),) = set(edit.source) - set(edit.target)
        ((_, new),) = set(edit.target) - set(edit.source)
        between = (index, tuple((a + b) // 2 // 2 * 2 for a, b in zip(old, new)))
        halfway = replace(edit, target=(*(set(edit.source) & set(edit.target)), between))
        (picture,) = world.render(target_scenes([halfway]))
        assert not check_edit(checker, picture, edit).is_followed or max(abs(a - b) for a, b in zip(old, new)) <= PATCH
    sampled = edits.sample(NUM_EDITS, seeded())
    _, target = pictures_of(world, sampled)
    for picture, edit, region in zip(target, sampled, edited_regions(sampled)):
        inside, outside = picture.clone(), picture.clone()
        inside[:, region] += 0.05
        outside[:, ~region] += 0.05
        assert check_edit(checker, inside, edit).psnr_outside == 100
        assert check_edit(checker, outside.clamp(-1, 1), edit).psnr_outside < 40


def test_a_picture_of_another_size_is_an_error(edits, checker):
    with pytest.raises(ValueError, match="64, 64"):
        check_edit(checker, torch.zeros(3, 64, 80), edits.sample(1, seeded())[0])


# Training


def test_the_source_is_the_users_and_the_target_the_assistants(world, edits):
    samples = edits.samples(3, seeded())
    source, target = pictures_of(world, edits.sample(3, seeded()))
    for sample, before, after in zip(samples, source, target):
        user, assistant = sample.messages
        assert (sample.task, user["role"], assistant["role"]) == ("edit", "user", "assistant")
        images = {part["type"]: part for part in user["content"]}
        assert set(images) == {"image", "text"}
        assert torch.equal(images["image"]["image"], before)
        assert torch.equal(assistant["content"][0]["image"], after)
    batch = collate(samples, toy_processor())
    assert batch["is_generated"].tolist() == [False, True] * 3


def test_a_stage_of_edits_trains(tmp_path):
    toy_pipeline().save_pretrained(tmp_path / "base")
    recipe = tiny.unimrg(str(tmp_path / "base"))
    stage = replace(recipe.stages[0], num_steps=1, tasks={"edit": 2}, data=ToyData(), held_out=ToyData(is_held_out=True),
                    num_held_out=2, muon_scale=0.0, warmup_steps=0, mixed_precision="no")  # fmt: skip
    recipe = replace(recipe, stages=(stage,), log_every=1, save_every=1, sample_every=100, sample_prompts=("a cat",))
    train_hydra(recipe, tmp_path / "run")
    rows = list(map(json.loads, (tmp_path / "run" / stage.name / "log.jsonl").read_text().splitlines()))
    assert any(0 < row["edit/flow"] < 100 for row in rows if "edit/flow" in row)
    assert any("held_out/edit/flow" in row for row in rows)
