"""Dialogues with drawn images: answers become messages, and messages with drawn images are read again."""

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_hf import HydraProcessor
from hydra_hf.modeling.outputs import HydraInterleavedOutput


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(level: int, width: int = 32) -> dict:
    return {"type": "image", "image": Image.new("RGB", (width, 32), (level,) * 3)}


def encode(processor: HydraProcessor, messages: list[dict], **kwargs):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def levels(pixel_values: torch.Tensor, num_images: int) -> list[int]:
    return [round(float(patches.mean() + 1) / 2 * 255) for patches in pixel_values.chunk(num_images)]


@pytest.fixture
def answer(tiny_processor) -> HydraInterleavedOutput:
    """To "what is in the picture": a cat, two images with nothing between them, a dog."""
    pads = "<|image_pad|>" * 17
    drawn = f"<|vision_start|>{pads}<|vision_end|>"
    prompt = "<|im_start|>user\nwhat is in the picture<|im_end|>\n<|im_start|>assistant\n"
    ids = tiny_processor.tokenizer(f"{prompt}a cat{drawn}{drawn}a dog<|im_end|>", return_tensors="pt")["input_ids"]
    length = len(tiny_processor.tokenizer(prompt)["input_ids"])
    images = [torch.full((3, 32, 32), value) for value in (-1.0, 1.0)]
    return HydraInterleavedOutput(sequences=ids, prompt_length=length, images=images)


def test_an_answer_becomes_the_parts_of_a_message(tiny_processor, answer):
    (parts,) = tiny_processor.post_process_multimodal_output(answer, generation_mode="interleaved")
    assert [part["type"] for part in parts] == ["text", "image", "image", "text"]
    assert [part.get("text") for part in parts] == ["a cat", None, None, "a dog"]
    assert [np.asarray(part["image"]).mean() for part in parts[1:3]] == [0, 255]


def test_an_answer_put_back_into_the_chat_has_the_tokens_that_were_generated(tiny_processor, answer):
    (parts,) = tiny_processor.post_process_multimodal_output(answer)
    messages = [{"role": "user", "content": "what is in the picture"}, {"role": "assistant", "content": parts}]
    inputs = encode(tiny_processor, messages)
    line_break = tiny_processor.tokenizer("\n")["input_ids"]
    assert inputs["input_ids"].tolist() == [[*answer.sequences[0].tolist(), *line_break]]
    assert levels(inputs["pixel_values"], 2) == [0, 255]


def test_an_answer_without_text_or_images_has_no_parts(tiny_processor):
    ids = tiny_processor.tokenizer("<|im_start|><|im_end|>", return_tensors="pt")["input_ids"]
    empty = HydraInterleavedOutput(sequences=ids, prompt_length=1, images=[])
    assert tiny_processor.post_process_multimodal_output(empty) == [[]]


def test_drawn_images_are_read_where_they_were_between_those_of_the_user(tiny_processor):
    messages = [
        {"role": "user", "content": [image(10), text("a cat")]},
        {"role": "assistant", "content": [text("two"), image(200, width=64), text("a dog")]},
        {"role": "user", "content": [image(90), text("what is in the picture")]},
    ]
    inputs = encode(tiny_processor, messages, add_generation_prompt=True)
    tokens = tiny_processor.tokenizer.decode(inputs["input_ids"][0]).replace("<|image_pad|>", "#")
    assert (
        tokens
        == f"""<|im_start|>user
<|vision_start|>{"#" * 17}<|vision_end|>a cat<|im_end|>
<|im_start|>assistant
two<|vision_start|>{"#" * 17}<|vision_end|>a dog<|im_end|>
<|im_start|>user
<|vision_start|>{"#" * 17}<|vision_end|>what is in the picture<|im_end|>
<|im_start|>assistant
"""
    )
    assert levels(inputs["pixel_values"], 3) == [10, 200, 90]
    assert (inputs["mm_token_type_ids"] == (inputs["input_ids"] == tiny_processor.image_token_id)).all()


def test_training_and_use_encode_a_dialogue_with_drawn_images_alike(tiny_processor):
    pixels = torch.zeros(3, 32, 32)
    parts = [{"type": "image", "image": pixels}]
    messages = [
        {"role": "user", "content": [text("a cat")]},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": [text("what is in the picture")]},
        {"role": "assistant", "content": [text("a cat")]},
    ]
    trained = tiny_processor.encode_conversations([messages])
    used = encode(tiny_processor, messages)
    for name in ("input_ids", "mm_token_type_ids", "image_grid_thw"):
        assert torch.equal(trained[name], used[name]), name


def test_a_dialogue_goes_on_after_an_answer_with_an_image(tiny_model, tiny_processor):
    """Three turns of a model of random weights, each answer put back as a message."""
    start_id = tiny_model.config.vision_start_token_id
    messages, generator = [], torch.Generator().manual_seed(0)
    for question in ("a cat", "what is in the picture", "draw a dog"):
        messages.append({"role": "user", "content": question})
        inputs = encode(tiny_processor, messages, add_generation_prompt=True)
        forced = torch.cat([inputs.pop("input_ids"), torch.tensor([[start_id]])], dim=1)
        inputs.pop("attention_mask"), inputs.pop("mm_token_type_ids")
        output = tiny_model.generate(
            forced, generation_mode="interleaved", max_new_tokens=3, num_inference_steps=1, max_images=1, height=8,
            width=16, do_sample=False, generator=generator, **inputs,
        )  # fmt: skip
        output.prompt_length -= 1
        messages.append({"role": "assistant", "content": tiny_processor.post_process_multimodal_output(output)[0]})
    assert len(encode(tiny_processor, messages)["image_grid_thw"]) == 3
