"""Dialogues with drawn images as training samples: what is drawn, what is read and what is scored in each."""

import base64
import copy
import io
import random

import pytest
import torch
from PIL import Image

from hydra_hf.data.collate import collate
from hydra_hf.data.readers import TaskReader
from hydra_hf.data.records import RecordReader, find_columns
from hydra_hf.data.sample import Sample
from hydra_hf.data.sources import Source
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
    return [Sample(task="interleave", messages=conversation) for conversation in split_turns(messages)]


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
        name="stage", num_steps=1, learning_rates={}, tasks={"interleave": 3}, data=None, mixed_precision="no"
    )
    bundle = {"interleave": batch | {"num_samples": 3}, "rows": {"interleave": [0, 1, 2]}, "step": 0}
    prepared = HydraObjective(stage, seed=0).prepare(tiny_model, bundle, "interleave")
    is_drawn = [False, True, False, False, True, False, False, False, False]
    assert prepared["is_generated"].tolist() == is_drawn
    assert (prepared["sigma"] > 0).tolist() == is_drawn
    clean = tiny_model.encode_images(batch["pixel_values"], batch["image_grid_thw"])
    changed = (prepared["latents"] - clean).abs().unflatten(0, (9, -1)).amax(dim=(1, 2)) > 1e-3
    assert changed.tolist() == is_drawn


def test_where_nothing_is_drawn_there_is_no_noise_and_the_vision_head_has_a_gradient_of_nothing(
    tiny_model, tiny_processor
):
    """Without one, processes that draw would wait for this one."""
    batch = collate(samples_of(dialogue())[-1:], tiny_processor) | {"num_samples": 1}
    stage = HydraStage(
        name="stage", num_steps=1, learning_rates={}, tasks={"interleave": 1}, data=None, mixed_precision="no"
    )
    bundle = {"interleave": batch, "rows": {"interleave": [0]}, "step": 0}
    objective = HydraObjective(stage, seed=0)
    counts = objective.count_targets(tiny_model, batch)
    assert counts["language"] > 0 == counts["flow"]
    prepared = objective.prepare(tiny_model, bundle, "interleave")
    assert not prepared["sigma"].any()
    assert torch.equal(prepared["latents"], tiny_model.encode_images(batch["pixel_values"], batch["image_grid_thw"]))
    losses = objective.losses_of(tiny_model, prepared, tiny_model(**prepared))
    sum(value * counts[name] for name, value in losses.items()).backward()
    gradients = [parameter.grad for parameter in tiny_model.vision_head.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


# Records


RECORD = {
    "messages": [
        {"role": "user", "content": "<image> draw"},
        {"role": "assistant", "content": "a cat <image> a dog <image>"},
        {"role": "user", "content": "what is in the picture"},
        {"role": "assistant", "content": "a dog"},
    ],
    "images": ["001.png", "002.png", "003.png"],
}


def text_of(sample: Sample, number_in) -> list[str]:
    """Each part: text, or the number of an image, with ! if it is drawn in this sample."""
    names = []
    for message in sample.messages:
        for part in message["content"]:
            is_drawn = message["role"] == "assistant" and not part.get("is_given")
            is_text = part["type"] == "text"
            names.append(part["text"] if is_text else f"#{number_in(part['image'])}{'!' * is_drawn}")
    return names


def test_each_epoch_takes_one_part_of_a_dialogue(cache, files, tiny_processor, number_in):
    folder = files.folder_of([1, 2, 3])
    source = Source(task="interleave", path=str(files.jsonl([RECORD])), image_root=str(folder))
    reader = TaskReader((source,), tiny_processor, 0, max_length=4096, drop_prompt=1.0)
    parts = [tuple(text_of(sample, number_in)) for sample in reader.batch(range(60))]
    asked = ["#1", "draw", "a cat"]
    expected = [
        (*asked, "#2!"),
        (*asked, "#2", "a dog", "#3!"),
        (*asked, "#2", "a dog", "#3", "what is in the picture", "a dog"),
    ]
    assert set(parts) == set(expected)
    assert min(map(parts.count, expected)) >= 10
    assert reader.batch([7])[0].messages[1]["content"][0] == {"type": "text", "text": "a cat"}
    assert [tuple(text_of(sample, number_in)) for sample in reader.batch([7, 8])] == parts[7:9]  # of the number alone


def test_a_sample_of_a_record_is_the_same_as_made_by_hand(cache, files, tiny_processor):
    """With images of parts and in bytes as OpenAI's form has them; a drawn one is cut as generated images are."""
    url = f"data:image/png;base64,{base64.b64encode(files.png(4, (40, 20))).decode()}"
    messages = [
        {"role": "user", "content": [text("draw")]},
        {
            "role": "assistant",
            "content": [text("a star"), {"type": "image_url", "image_url": {"url": url}}, text("so")],
        },
    ]
    record = {"messages": messages}
    reader = RecordReader(find_columns({"messages"}, ()), files.folder, tiny_processor.image_processor)
    samples = [reader.sample(record, "interleave", random.Random(seed)) for seed in range(8)]
    levels = tiny_processor.image_processor.generated_levels(Image.open(io.BytesIO(files.png(4, (40, 20)))))
    picture = {"type": "image", "image": levels}
    by_hand = [
        [messages[0], {"role": "assistant", "content": [text("a star"), picture]}],
        [messages[0], {"role": "assistant", "content": [text("a star"), picture | {"is_given": True}, text("so")]}],
    ]
    batches = [collate([Sample(task="interleave", messages=each)], tiny_processor) for each in by_hand]
    seen = set()
    for batch in (collate([sample], tiny_processor) for sample in samples):
        (same,) = [
            index for index, expected in enumerate(batches)
            if expected.keys() == batch.keys() and all(torch.equal(expected[name], batch[name]) for name in batch)
        ]  # fmt: skip
        seen.add(same)
    assert seen == {0, 1}


def wrong(**changes) -> dict:
    return {**RECORD, **changes}


def turns(*contents) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


WRONG = {
    "an image file that is not there": wrong(images=["004.png"] * 3),
    "not as many images as placeholders": wrong(images=["001.png", "002.png"]),
    "an empty turn": wrong(messages=turns("<image> draw", "<image> <image>", " ", "a dog")),
    "no image of the assistant": wrong(messages=turns("<image> <image> <image> draw", "a dog")),
    "an image that cannot be decoded": wrong(images=["broken.png"] * 3),
    "no turns": wrong(messages=[]),
    "no turn of an assistant": wrong(messages=turns("<image> <image> <image>")),
    "a clip in a sample of images": wrong(messages=turns("<video>", "<image> <image> <image>"), video="a.mp4"),
}


def test_dialogues_that_cannot_be_read_are_skipped_and_counted(cache, files, tiny_processor, number_in):
    folder = files.folder_of([1, 2, 3])
    (folder / "broken.png").write_bytes(b"no picture")
    path = files.jsonl([*WRONG.values(), RECORD])
    source = Source(task="interleave", path=str(path), image_root=str(folder))
    reader = TaskReader((source,), tiny_processor, 0, max_length=4096)
    samples = reader.batch(range(len(WRONG) + 1))  # an epoch
    assert all(text_of(sample, number_in)[:3] == ["#1", "draw", "a cat"] for sample in samples)
    assert {key.removeprefix(f"{path}: ") for key in reader.num_skipped} == set(WRONG)


def test_other_columns_than_a_chat_are_no_dialogue(cache, files, tiny_processor):
    path = files.jsonl([{"image": "001.png", "caption": "a cat"}])
    with pytest.raises(ValueError, match="no conversations for the task 'interleave'"):
        TaskReader((Source(task="interleave", path=str(path)),), tiny_processor, 0, max_length=4096)


def test_latents_of_dialogues_are_not_kept():
    with pytest.raises(ValueError, match="got task='interleave'"):
        Source(task="interleave", path="a.jsonl", latents="latents")
