"""Dialogues with drawn images as training samples: what is drawn, what is read and what is scored in each."""

import copy

import pytest
import torch

from hydra_hf.data.collate import collate
from hydra_hf.data.sample import Sample
from hydra_hf.data.turns import split_turns
from hydra_hf.training.objective import HydraObjective
from hydra_hf.training.recipe import HydraStage


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(value: float) -> dict:
    return {"type": "image", "image": torch.full((3, 8, 16), value)}


def dialogue() -> list[dict]:
    """Two turns, with two images in the assistant's first one and text around each."""
    return [
        {"role": "user", "content": [image(0.1), text("draw")]},
        {"role": "assistant", "content": [text("a cat"), image(0.2), text("a dog"), image(0.3), text("two")]},
        {"role": "user", "content": [image(0.4), text("what is in")]},
        {"role": "assistant", "content": [text("a red star")]},
    ]


def drawn(conversation: list[dict]) -> list[str]:
    """Each turn's parts: text, "given" or "drawn" image."""
    names = []
    for message in conversation:
        kinds = {"user": "given", "assistant": "drawn"}
        names += [
            part["text"] if part["type"] == "text" else "given" if part.get("is_given") else kinds[message["role"]]
            for part in message["content"]
        ]
    return names


def samples_of(messages: list[dict]) -> list[Sample]:
    return [Sample(task="edit", messages=conversation) for conversation in split_turns(messages)]


def test_each_image_is_drawn_once_and_read_in_what_follows():
    assert [drawn(conversation) for conversation in split_turns(dialogue())] == [
        ["given", "draw", "a cat", "drawn"],
        ["given", "draw", "a cat", "given", "a dog", "drawn"],
        ["given", "draw", "a cat", "given", "a dog", "given", "two", "given", "what is in", "a red star"],
    ]


def test_the_dialogue_stays_as_it_is():
    messages = dialogue()
    before = copy.deepcopy(messages)
    split_turns(messages)
    assert [drawn([message]) for message in messages] == [drawn([message]) for message in before]


def test_a_dialogue_without_drawn_images_is_one_conversation():
    messages = [dialogue()[2], dialogue()[3]]
    assert split_turns(messages) == [messages]


@pytest.mark.parametrize("messages", [dialogue(), dialogue()[:1] + [{"role": "assistant", "content": [image(0.2)]}]])
def test_every_token_of_the_assistant_is_scored_once(messages, tiny_processor):
    """All that it writes: text, the start and the end of images, the end of its turns; placeholders are no text."""
    whole = tiny_processor.encode_conversations([messages])
    scored = torch.zeros_like(whole["input_ids"][0])
    for sample in samples_of(messages):
        labels = collate([sample], tiny_processor)["labels"][0]
        scored[: len(labels)] += (labels != -100)[: len(scored)]  # a conversation begins as the dialogue does
    is_text = whole["input_ids"][0] != tiny_processor.image_token_id
    assert torch.equal(scored, (whole["assistant_masks"][0].bool() & is_text).long())


@torch.no_grad()
def test_noise_is_on_the_image_that_is_drawn_and_on_no_other(tiny_model, tiny_processor):
    batch = collate(samples_of(dialogue()), tiny_processor)
    stage = HydraStage(
        name="stage", num_steps=1, learning_rates={}, tasks={"edit": 3}, data=None, mixed_precision="no"
    )
    bundle = {"edit": batch | {"num_samples": 3}, "rows": {"edit": [0, 1, 2]}, "step": 0}
    prepared = HydraObjective(stage, seed=0).prepare(tiny_model, bundle, "edit")
    is_drawn = [False, True, False, False, True, False, False, False, False]
    assert prepared["is_generated"].tolist() == is_drawn
    assert (prepared["sigma"] > 0).tolist() == is_drawn
    clean = tiny_model.encode_images(batch["pixel_values"], batch["image_grid_thw"])
    changed = (prepared["latents"] - clean).abs().unflatten(0, (9, -1)).amax(dim=(1, 2)) > 1e-3
    assert changed.tolist() == is_drawn


def test_a_conversation_in_which_nothing_is_drawn_has_no_noise(tiny_model, tiny_processor):
    batch = collate(samples_of(dialogue())[-1:], tiny_processor)
    stage = HydraStage(
        name="stage", num_steps=1, learning_rates={}, tasks={"edit": 1}, data=None, mixed_precision="no"
    )
    bundle = {"edit": batch | {"num_samples": 1}, "rows": {"edit": [0]}, "step": 0}
    objective = HydraObjective(stage, seed=0)
    outputs = tiny_model(**objective.prepare(tiny_model, bundle, "edit"))
    assert set(objective.losses_of(outputs)) == {"language"}
