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
from hydra_hf.toy.phrasing import PHRASINGS, PLAIN, RELATIONS, with_article
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer
from hydra_hf.toy.world import PATCH, ToyWorld, color_fields
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.recipes import tiny
from toy_models import toy_pipeline, toy_processor


NUM_EDITS = 16
AREAS = {
    (0, 0): "in the top left", (16, 0): "at the top", (32, 0): "in the top right",
    (0, 16): "on the left", (16, 16): "in the middle", (32, 16): "on the right",
    (0, 32): "in the bottom left", (16, 32): "at the bottom", (32, 32): "in the bottom right",
}  # fmt: skip


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


def says(edit: Edit, a: str, b: str = "") -> bool:
    """Whether the instruction is one of the forms of its kind, with these words."""
    return edit.instruction in {form.format(a=a, b=b) for forms in FORMS[edit.kind] for form in forms}


def is_true_relation(relation: str, place: tuple[int, int], other: tuple[int, int]) -> bool:
    (x, y), (other_x, other_y) = place, other
    is_level, is_over = y == other_y, x == other_x
    return {
        "above": is_over and y < other_y, "below": is_over and y > other_y,
        "left of": is_level and x < other_x, "right of": is_level and x > other_x,
    }[relation]  # fmt: skip


@pytest.mark.parametrize("wording", ["train", "test"])
def test_what_is_recolored_removed_or_replaced_is_what_the_instruction_says(world, edits, wording):
    for edit in edits.sample(100, seeded(), kinds=("recolor", "remove", "replace"), wording=wording):
        gone, come = change_of(world, edit)
        ((old, place),) = gone.items()
        if edit.kind == "remove":
            assert not come
            assert says(edit, old)
            continue
        ((new, new_place),) = come.items()
        assert place == new_place
        if edit.kind == "replace":
            assert says(edit, old, with_article(new))
            continue
        color, shape = new.split()
        assert old.split()[1] == shape
        is_only = sum(world.names[index].endswith(f" {shape}") for index, _ in edit.source) == 1
        assert says(edit, old, color) or (is_only and says(edit, shape, color))


@pytest.mark.parametrize("wording", ["train", "test"])
def test_what_is_added_is_where_the_instruction_says(world, edits, wording):
    relations = {
        said: relation
        for phrasing in (PLAIN, *PHRASINGS["relation"][0], *PHRASINGS["relation"][1])
        for said, relation in zip(phrasing.relations, RELATIONS)
    }
    num_next_to = 0
    for edit in edits.sample(100, seeded(), kinds=("add",), wording=wording):
        gone, come = change_of(world, edit)
        ((new, place),) = come.items()
        assert not gone
        next_to = [
            is_true_relation(relation, place, other)
            for said, relation in relations.items()
            for index, other in edit.source
            if says(edit, with_article(new), f"{said} the {world.names[index]}")
        ]
        assert next_to == [True] or (not next_to and says(edit, with_article(new), AREAS[place]))
        num_next_to += len(next_to)
    assert 20 < num_next_to < 80


def test_what_is_moved_goes_where_the_instruction_says(world, edits):
    sides = set()
    for edit in edits.sample(200, seeded(), kinds=("move",)):
        gone, come = change_of(world, edit)
        ((name, (x, y)),), ((same_name, place),) = gone.items(), come.items()
        assert name == same_name
        ends = {"left": (0, y), "right": (32, y), "top": (x, 0), "bottom": (x, 32), "middle": (16, 16)}
        ends |= {area.removeprefix("in the "): corner for corner, area in AREAS.items() if 16 not in corner}
        (said,) = [end for end in ends if says(edit, name, f"to the {end}")]
        assert place == ends[said]
        sides.add(said)
    assert len(sides) == 9


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
    known = set(re.findall(r"\w+|[^\w\s]", " ".join(before + edit_corpus()).lower()))
    said = [edit.instruction for wording in ("train", "test") for edit in edits.sample(300, seeded(), wording=wording)]
    assert {word for text in said for word in re.findall(r"\w+|[^\w\s]", text)} <= known
    tokenizer = train_toy_tokenizer(before + clip_corpus() + edit_corpus())
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in known if word.isalpha())
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
    assert followed[1] >= 0.9
    assert followed[2] == 0
    is_same = [set(edit.target) == set(other.target) for edit, other in zip(sampled, sampled[-1:] + sampled[:-1])]
    assert [verdict.is_followed for verdict in verdicts[3]] == is_same
    assert sum(is_same) <= 1
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


def test_shares_of_prompts_are_dropped_with_the_picture_or_ask_for_a_copy(world, edits):
    samples = edits.samples(300, seeded(), drop_prompt=0.2, copy_share=0.2)
    plain = edits.samples(300, seeded())
    forms = []
    for sample, edited in zip(samples, plain):
        user, assistant = sample.messages
        parts = {
            part["type"]: part[part["type"]] for part in user["content"]
        }  # an empty text, as in the pipeline's null prompt
        expected = edited.messages[1]["content"][0]["image"]
        if not parts["text"] and "image" in parts:
            expected = parts["image"]
        assert torch.equal(assistant["content"][0]["image"], expected)
        forms.append(("image" in parts, bool(parts["text"])))
    counts = {form: forms.count(form) for form in set(forms)}
    assert set(counts) == {(True, True), (True, False), (False, False)}
    assert all(40 < counts[form] < 80 for form in ((True, False), (False, False)))


def test_a_color_field_is_behind_both_pictures_and_leaves_the_edit_as_it_is(world, edits):
    fields, plain = (
        edits.samples(20, seeded(), drop_prompt=0.2, color_field_share=1.0),
        edits.samples(20, seeded(), drop_prompt=0.2),
    )
    drawn = edits.sample(20, seeded())
    for sample, expected, edit, outside in zip(fields, plain, drawn, ~edited_regions(drawn)):
        (user, assistant), (same_user, same_assistant) = sample.messages, expected.messages
        target, flat_target = assistant["content"][0]["image"], same_assistant["content"][0]["image"]
        assert user["content"][-1] == same_user["content"][-1]  # what is asked for
        if len(user["content"]) == 1:  # dropped: guidance starts from the backgrounds of the world
            assert torch.equal(target, flat_target)
            continue
        source = user["content"][0]["image"]
        assert torch.equal(source[:, outside], target[:, outside])
        assert not torch.equal(target, flat_target)
        objects = world.object_masks(target_scenes([edit]))[0].any(0)
        solid = ~torch.nn.functional.max_pool2d((~objects).float()[None], 3, stride=1, padding=1)[
            0
        ].bool()  # without soft edges
        assert (target - flat_target)[:, solid].abs().median() < 0.01


def test_color_fields_are_colors_of_one_to_sixteen_places():
    fields = color_fields(200, (48, 96), seeded())
    assert fields.shape == (200, 3, 48, 96)
    assert 0 <= fields.min() < 0.05
    assert 0.95 < fields.max() <= 1
    is_flat = ((fields - fields[..., :1, :1]).abs() < 1e-5).flatten(1).all(1)
    assert 40 < is_flat.sum() < 95
    corners = fields[..., [0, -1, 0, -1], [0, 0, -1, -1]]  # (200, 3, 4)
    assert (corners[~is_flat].std(2) > 0).all()
    assert torch.equal(fields, color_fields(200, (48, 96), seeded()))


def test_a_stage_of_edits_trains(tmp_path):
    toy_pipeline().save_pretrained(tmp_path / "base")
    recipe = tiny.unimrg(str(tmp_path / "base"))
    stage = replace(recipe.stages[0], num_steps=2, tasks={"edit": 2}, data=ToyData(), held_out=ToyData(is_held_out=True),
                    num_held_out=2, muon_scale=0.0, warmup_steps=1, mixed_precision="no")  # fmt: skip
    recipe = replace(recipe, stages=(stage,), log_every=1, save_every=1, sample_every=100, sample_prompts=("a cat",))
    train_hydra(recipe, tmp_path / "run")
    rows = list(map(json.loads, (tmp_path / "run" / stage.name / "log.jsonl").read_text().splitlines()))
    assert rows[0]["edit/flow"] > 0
    assert any("held_out/edit/flow" in row for row in rows)
