"""transformers' own pipelines on a saved checkpoint: it reads pictures and text, and draws."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LogitsProcessor,
    pipeline,
)


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path) -> str:
    """Model and processor in one folder, as they are pushed to the Hub."""
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def chat() -> list[dict]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is in the picture"}],
        }
    ]


def test_image_text_to_text_answers_as_generate_does(checkpoint, chat):
    ask = pipeline("image-text-to-text", model=checkpoint)
    answer = ask(text=chat, max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(checkpoint),
        AutoProcessor.from_pretrained(checkpoint),
    )
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() == expected.strip()


def test_any_to_any_draws_what_the_pipeline_of_diffusers_draws(checkpoint, tiny_pipeline):
    draw = pipeline("any-to-any", model=checkpoint)
    assert isinstance(draw.model, type(AutoModelForMultimodalLM.from_pretrained(checkpoint)))
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0}
    drawn = draw(
        [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}],
        generation_mode="image",
        generate_kwargs={**settings, "generator": torch.Generator().manual_seed(0)},
    )[0]["generated_image"]
    expected = tiny_pipeline("a cat", generator=torch.Generator().manual_seed(0), **settings).images[0]
    difference = np.abs(np.asarray(drawn, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1


def test_any_to_any_answers(checkpoint, chat):
    ask = pipeline("any-to-any", model=checkpoint)
    answer = ask(text=chat, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    assert isinstance(answer, str)


class Draws(LogitsProcessor):
    """Makes a model of random weights draw after its second token, and end after its fourth."""

    def __init__(self, vision_start: int, end: int):
        self.decisions, self.number = {2: vision_start, 4: end}, -1

    def __call__(self, input_ids, scores):
        self.number += 1
        if self.number not in self.decisions:
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.decisions[self.number]]), 0.0)


def test_any_to_any_returns_text_and_images_of_one_answer(checkpoint, chat):
    talk = pipeline("any-to-any", model=checkpoint)
    config = talk.model.config

    def settings():
        decisions = Draws(config.vision_start_token_id, config.text_config.eos_token_id)
        return {
            "generation_mode": "interleaved", "num_inference_steps": 2, "guidance_scale": 3.0, "do_sample": False,
            "logits_processor": [decisions], "generator": torch.Generator().manual_seed(0), "max_new_tokens": 8,
        }  # fmt: skip

    dialogue = talk(chat, generate_kwargs=settings())[0]["generated_text"]
    assert dialogue[:1] == chat
    assert dialogue[1]["role"] == "assistant"
    assert [part["type"] for part in dialogue[1]["content"]] == ["text", "image", "text"]
    inputs = talk.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = talk.model.generate(**inputs, **settings())
    (expected,) = talk.processor.post_process_multimodal_output(output)
    assert dialogue[1]["content"] == expected
    assert talk(chat, generate_kwargs=settings(), return_full_text=False)[0]["generated_text"] == expected
    dialogue.append({"role": "user", "content": [{"type": "text", "text": "what is in the picture"}]})
    assert len(talk(dialogue, generate_kwargs=settings())[0]["generated_text"]) == 4
