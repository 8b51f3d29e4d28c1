"""transformers' own pipelines on a saved checkpoint: it reads pictures and text, and draws."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline


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
