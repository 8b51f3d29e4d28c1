"""Answers in text and images: what is drawn, what the language model reads, and how often."""

from collections import Counter

import pytest
import torch
from tiny import END, IMAGE, START, hydra_model, pictures, sequence
from torch import Tensor
from transformers import LogitsProcessor

from hydra_hf import HydraForConditionalGeneration
from hydra_hf.modeling.prefix_cache import FrozenPrefixCache


STOP = 63
PICTURE = 10  # tokens of a drawn image: the time token and 3 x 3 patches


class Script(LogitsProcessor):
    """Decides which tokens are generated, and keeps the logits that the model gave for each."""

    def __init__(self, *tokens: int):
        self.tokens, self.logits = list(tokens), []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[len(self.logits)]
        self.logits.append(scores[0].clone())
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request) -> HydraForConditionalGeneration:
    return hydra_model(request.param)


@pytest.fixture(scope="module")
def qwen() -> HydraForConditionalGeneration:
    return hydra_model()


def prompt() -> dict[str, Tensor]:
    input_ids = torch.tensor([sequence(1, 2, "image", 3, "image", 4)])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).long(),
        "pixel_values": pictures(2),
    }


def answer(model, script: Script | None = None, inputs: dict | None = None, **kwargs):
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "eos_token_id": STOP, "do_sample": False}
    settings |= {"generator": torch.Generator().manual_seed(0), "logits_processor": [script] if script else None}
    return model.generate(**(inputs or prompt()), generation_mode="interleaved", **{**settings, **kwargs})


def test_an_answer_is_text_and_images_where_the_model_drew_them(model):
    output = answer(model, Script(5, START, 6, 7, START, STOP))
    given, drawn = prompt()["input_ids"][0].tolist(), [START, *[IMAGE] * PICTURE, END]
    assert output.sequences.tolist() == [[*given, 5, *drawn, 6, 7, *drawn, STOP]]
    assert output.prompt_length == len(given)
    assert [image.shape for image in output.images] == [(3, 12, 12)] * 2
    assert [latents.shape for latents in output.latents] == [(1, 6, 3, 3)] * 2
    assert not torch.allclose(*output.images)


@torch.no_grad()
def test_text_after_an_image_continues_from_the_clean_image(model):
    """The logits of every generated token are those of one forward over the whole answer, its images given at sigma 0."""
    script = Script(5, START, 6, 7, START, 8, STOP)
    output = answer(model, script, height=8)
    given = model.encode_images(prompt()["pixel_values"])  # (2, 6, 2, 2)
    tokens = [latents.flatten(2).transpose(1, 2).flatten(0, 1) for latents in (given, *output.latents)]
    grids = torch.tensor([[1, 2, 2], [1, 2, 2], [1, 2, 3], [1, 2, 3]])
    logits = model(
        output.sequences, latents=torch.cat(tokens), image_grid_thw=grids, sigma=torch.zeros(4)
    ).logits[0]  # fmt: skip
    row = output.sequences[0]
    is_generated = (row != IMAGE) & (row != END) & (torch.arange(len(row)) >= output.prompt_length)
    assert row[is_generated].tolist() == script.tokens
    for place, expected in zip(is_generated.nonzero()[:, 0].tolist(), script.logits, strict=True):
        text = torch.arange(len(expected)) != IMAGE  # which is never text
        torch.testing.assert_close(logits[place - 1][text], expected[text], atol=1e-4, rtol=1e-4)
    noisy = [noise + torch.randn_like(noise) for noise in tokens]
    other = model(output.sequences, latents=torch.cat(noisy), image_grid_thw=grids, sigma=torch.zeros(4)).logits[0]
    assert (other[-2] - logits[-2]).abs().max() > 1e-2  # the images matter


def test_every_token_is_read_once_and_drawing_reads_images_only(qwen):
    read = Counter()

    def count(module, args, kwargs):
        is_step = isinstance(kwargs.get("cache", kwargs.get("past_key_values")), FrozenPrefixCache)
        read["steps" if is_step else "answer"] += kwargs["inputs_embeds"].shape[1]

    handle = qwen.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        output = answer(qwen, Script(5, START, 6, START, STOP), guidance_scale=1.0)
        assert read == {"answer": output.sequences.shape[1] - 1, "steps": 2 * 2 * PICTURE}
        read.clear()
        answer(qwen, Script(5, START, 6, START, STOP), guidance_scale=3.0)
        null = 2 * len(qwen.config.null_prompt_ids)  # the null prompt, for each image
        assert read == {"answer": output.sequences.shape[1] - 1 + null, "steps": 2 * 2 * 2 * PICTURE}
    finally:
        handle.remove()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_is_the_one_that_generate_images_draws_after_the_same_prompt(qwen, guidance_scale):
    ids = torch.tensor([[1, 2, 3]])
    settings = {"num_inference_steps": 2, "guidance_scale": guidance_scale, "height": 8}
    output = answer(qwen, Script(5, START, STOP), {"input_ids": ids}, **settings)
    expected = qwen.generate(
        torch.tensor([[1, 2, 3, 5, START]]),
        generation_mode="image",
        generator=torch.Generator().manual_seed(0),
        **settings,
    )
    torch.testing.assert_close(output.images[0], expected[0], atol=1e-5, rtol=1e-5)


def test_an_answer_without_images_is_the_one_that_generate_gives(model):
    kwargs = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [START, IMAGE]}
    output = answer(model, inputs=prompt(), **kwargs)
    assert output.images == []
    assert torch.equal(output.sequences, model.generate(**prompt(), eos_token_id=STOP, **kwargs))


def test_a_prompt_that_ends_with_the_start_of_an_image_begins_with_one(qwen):
    inputs = prompt()
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[START]])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    begun, chosen = answer(qwen, Script(6, STOP), inputs), answer(qwen, Script(START, 6, STOP))
    assert torch.equal(begun.sequences, chosen.sequences)
    assert begun.prompt_length == chosen.prompt_length + 1
    torch.testing.assert_close(begun.images[0], chosen.images[0], atol=1e-5, rtol=1e-5)


def test_no_more_images_are_drawn_than_the_limit(qwen):
    bias = [[[START], 1000.0]]  # whatever it reads, the model wants to draw
    output = answer(qwen, sequence_bias=bias, max_images=2, max_new_tokens=5)
    assert len(output.images) == 2
    assert (output.sequences == START).sum() == 2 + 2  # and two in the prompt
    text = output.sequences[0, output.prompt_length + 2 * (PICTURE + 2) :]
    assert len(text) == 3
    assert not {START, IMAGE} & {*text.tolist()}


@pytest.mark.parametrize(("max_new_tokens", "written"), [(1, [5]), (2, [5, START]), (3, [5, START, 6])])
def test_max_new_tokens_counts_what_the_language_head_writes(qwen, max_new_tokens, written):
    row = answer(qwen, Script(5, START, 6, 7, 8), max_new_tokens=max_new_tokens).sequences[0]
    row = row[prompt()["input_ids"].shape[1] :]
    assert row[(row != IMAGE) & (row != END)].tolist() == written
    assert (row == IMAGE).sum() == (PICTURE if START in written else 0)  # an image that has begun is finished


def test_padding_changes_nothing(qwen):
    padded = {
        name: torch.nn.functional.pad(value, (3, 0)) for name, value in prompt().items() if name != "pixel_values"
    }
    padded["pixel_values"] = prompt()["pixel_values"]
    expected, output = answer(qwen, Script(5, START, STOP)), answer(qwen, Script(5, START, STOP), padded)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.images[0], expected.images[0])


def test_the_callers_config_is_used_and_stays_as_it_is(qwen):
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=2, eos_token_id=STOP)
    before = config.to_dict()
    output = answer(qwen, Script(5, 6, 7), eos_token_id=None, generation_config=config)
    assert output.sequences.shape[1] == output.prompt_length + 2
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"input_ids": torch.ones(2, 3, dtype=torch.long)}}, r"shape \(2, 3\), expected \(1, P\)"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences=3"),
        ({"max_images": 0}, "max_images=0"),
        ({"use_cache": True, "past_key_values": ()}, "past_key_values"),
        ({"height": 13}, "height=13"),
    ],
)
def test_what_one_answer_cannot_have_is_refused(qwen, change, message):
    with pytest.raises(ValueError, match=message):
        answer(qwen, Script(5, STOP), **change)


def test_an_image_beyond_the_context_is_refused(make_tiny_model):
    model = make_tiny_model()  # a context of 128
    ids = torch.ones(1, 120, dtype=torch.long)
    start_id = model.config.vision_start_token_id
    with pytest.raises(ValueError, match="expected at most 128 together"):
        answer(model, Script(5, start_id), {"input_ids": ids})


def drawn(model, steps: Tensor, **kwargs) -> Tensor:
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 8, "width": 8}
    return model.generate_images(steps, generator=torch.Generator().manual_seed(0), **settings, **kwargs)[0]


def test_an_edit_in_a_dialogue_sees_the_last_image_in_sem_vit(qwen):
    row = sequence(1, 2, "image", 4)
    inputs = {"input_ids": torch.tensor([row]), "pixel_values": pictures(1)}
    size = {"height": 8, "width": 8, "guidance_scale": 1.0}
    edited = answer(qwen, Script(START, STOP), inputs, **size, source_interaction=True).images[0]
    prefix = torch.tensor([[*row, START]])
    expected = drawn(qwen, prefix, pixel_values=pictures(1), source_interaction=True)
    torch.testing.assert_close(edited, expected, atol=1e-4, rtol=1e-4)
    plain = answer(qwen, Script(START, STOP), inputs, **size).images[0]
    assert not torch.allclose(plain, edited, atol=1e-3)


def test_the_second_image_of_an_answer_is_an_edit_of_the_first(qwen):
    inputs, size = {"input_ids": torch.tensor([[1, 2]])}, {"height": 8, "width": 8}
    plain, edited = (
        answer(qwen, Script(START, 5, START, STOP), inputs, **size, source_interaction=interaction).images
        for interaction in (False, True)
    )
    torch.testing.assert_close(edited[0], plain[0])
    assert not torch.allclose(edited[1], plain[1], atol=1e-3)
