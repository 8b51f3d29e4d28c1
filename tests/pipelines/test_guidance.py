"""Guidance of a batch is guidance of each sample, whatever else is in the batch."""

import pytest
import torch
from torch import Tensor

from hydra_hf.modeling.image_generation import GuidanceBranch, classifier_free, guide


PROMPTS = ["a cat", "draw a dog left of a green star and two blue squares", "", "a red circle"]
NEGATIVE = ["two blue squares left of a dog", "", "a cat", "a star"]
SHAPE = (4, 4, 4)  # latent channels and grid of the tiny tokenizer


def gaussian(number: int, seed: int = 7) -> Tensor:
    return torch.randn((number, *SHAPE), generator=torch.Generator().manual_seed(seed))


def drawn(pipeline, prompt, **kwargs) -> Tensor:
    return pipeline(prompt, output_type="latent", **kwargs).images


def std(samples: Tensor) -> Tensor:
    return samples.flatten(1).std(1)


def two(conditional: Tensor, unconditional: Tensor, scale: Tensor, rescale: Tensor) -> Tensor:
    return guide([unconditional, conditional], [torch.ones(len(scale)), scale], rescale)


# One step


def test_no_rescale_is_plain_guidance():
    conditional, unconditional = gaussian(3), gaussian(3, seed=8)
    guided = two(conditional, unconditional, torch.tensor([1.0, 3.0, 0.0]), torch.zeros(3))
    expected = torch.stack([conditional[0], 3 * conditional[1] - 2 * unconditional[1], unconditional[2]])
    torch.testing.assert_close(guided, expected)


def test_full_rescale_gives_each_sample_the_spread_of_its_condition():
    conditional, unconditional = gaussian(3) * torch.tensor([1.0, 5.0, 0.1])[:, None, None, None], gaussian(3, seed=8)
    guided = two(conditional, unconditional, torch.full((3,), 4.0), torch.ones(3))
    torch.testing.assert_close(std(guided), std(conditional))
    plain = two(conditional, unconditional, torch.full((3,), 4.0), torch.zeros(3))
    assert (std(plain) / std(conditional) > 1.5).all()
    torch.testing.assert_close(guided / std(guided)[:, None, None, None], plain / std(plain)[:, None, None, None])


def test_half_a_rescale_is_half_way():
    arguments = gaussian(2), gaussian(2, seed=8), torch.full((2,), 4.0)
    none, half, full = (two(*arguments, torch.full((2,), rescale)) for rescale in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + full) / 2)


def test_a_velocity_of_zeros_stays_finite():
    zeros = torch.zeros(1, *SHAPE)
    assert torch.equal(two(zeros, zeros, torch.tensor([4.0]), torch.ones(1)), zeros)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@torch.no_grad()
def test_every_sample_of_a_step_has_its_own_scale(tiny_pipeline, rescale):
    model, grid, sigma = tiny_pipeline.model, (1, 4, 4), torch.tensor([0.9, 0.5, 0.2, 0.7])
    scales, rescales = torch.tensor([1.5, 4.0, 7.0, 1.0]), rescale * torch.tensor([1.0, 0.5, 0.0, 1.0])
    prefixes = [tiny_pipeline.prepare_prefix(texts, grid, 1, None, None) for texts in (PROMPTS, NEGATIVE)]
    together = model.denoise_step(gaussian(4), sigma, classifier_free(*prefixes, scales), rescales)
    for index in range(4):
        one = slice(index, index + 1)
        prefixes = [tiny_pipeline.prepare_prefix(texts[one], grid, 1, None, None) for texts in (PROMPTS, NEGATIVE)]
        branches = classifier_free(*prefixes, scales[index].item())
        arguments = gaussian(4)[one], sigma[one], branches, rescales[index].item()
        torch.testing.assert_close(together[one], model.denoise_step(*arguments), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_two_branches_are_classifier_free_guidance_bit_for_bit(tiny_pipeline):
    model, sigma = tiny_pipeline.model, torch.tensor([0.9, 0.5, 0.2, 0.7])
    prefixes = [tiny_pipeline.prepare_prefix(texts, (1, 4, 4)) for texts in (PROMPTS, NEGATIVE)]
    conditional, unconditional = (model.denoise_step(gaussian(4), sigma, [GuidanceBranch(one)]) for one in prefixes)
    guided = model.denoise_step(gaussian(4), sigma, classifier_free(*prefixes, 4.5))
    assert torch.equal(guided, unconditional + 4.5 * (conditional - unconditional))


@torch.no_grad()
def test_three_branches_add_up_and_share_one_pass_of_sem_vit(tiny_pipeline):
    """As in InstructPix2Pix: from nothing to the image, then to image and text, each difference with its own weight."""
    model, sigma, calls = tiny_pipeline.model, torch.tensor([0.9, 0.5, 0.2, 0.7]), []
    texts = NEGATIVE, ["a dog"] * 4, PROMPTS
    prefixes = [tiny_pipeline.prepare_prefix(branch, (1, 4, 4)) for branch in texts]
    alone = [model.denoise_step(gaussian(4), sigma, [GuidanceBranch(prefix)]) for prefix in prefixes]
    model.model.vision_tower.sem_vit.register_forward_hook(lambda *args: calls.append(1))
    branches = [GuidanceBranch(prefix, weight) for prefix, weight in zip(prefixes, (1.0, 1.5, 7.0))]
    guided = model.denoise_step(gaussian(4), sigma, branches)
    expected = alone[0] + 1.5 * (alone[1] - alone[0]) + 7 * (alone[2] - alone[1])
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 1


def test_no_branch_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="no branches"):
        tiny_pipeline.model.denoise_step(gaussian(4), torch.ones(4), [])


def test_guidance_of_another_number_of_samples_is_refused(tiny_pipeline):
    prefixes = [tiny_pipeline.prepare_prefix(texts, (1, 4, 4), 1, None, None) for texts in (PROMPTS, NEGATIVE)]
    with pytest.raises(ValueError, match="Guidance of 3 values does not fit 4 images"):
        tiny_pipeline.model.denoise_step(gaussian(4), torch.ones(4), classifier_free(*prefixes, torch.ones(3)))


# Whole pictures


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_rescale": 0.7},
        {"guidance_interval": (0.3, 0.9)},
        {"guidance_rescale": 1.0, "guidance_interval": (0.3, 0.9), "pad_to_multiple_of": 32},
    ],
)
def test_a_sample_is_drawn_alike_alone_and_among_others(tiny_pipeline, options):
    options |= {"num_inference_steps": 5, "guidance_scale": 4.0}
    batch = drawn(tiny_pipeline, PROMPTS, negative_prompt=NEGATIVE, latents=gaussian(4), **options)
    for index, (prompt, negative_prompt) in enumerate(zip(PROMPTS, NEGATIVE)):
        one = slice(index, index + 1)
        alone = drawn(tiny_pipeline, prompt, negative_prompt=negative_prompt, latents=gaussian(4)[one], **options)
        torch.testing.assert_close(batch[one], alone, atol=1e-5, rtol=1e-5)


def test_rescaled_guidance_draws_less_contrast(tiny_pipeline):
    plain, half, full = (
        drawn(tiny_pipeline, PROMPTS, latents=gaussian(4), guidance_scale=8.0, guidance_rescale=rescale)
        for rescale in (0.0, 0.5, 1.0)
    )
    way = [std(latents - gaussian(4)).mean() for latents in (full, half, plain)]
    assert way[0] < way[1] < way[2]


def test_rescale_without_guidance_changes_nothing(tiny_pipeline):
    latents = {"latents": gaussian(1), "guidance_scale": 1.0}
    plain, rescaled = (drawn(tiny_pipeline, "a cat", guidance_rescale=rescale, **latents) for rescale in (0.0, 1.0))
    assert torch.equal(plain, rescaled)


def test_padding_further_left_changes_nothing(tiny_pipeline):
    plain, padded = (
        drawn(tiny_pipeline, PROMPTS, latents=gaussian(4), pad_to_multiple_of=multiple) for multiple in (None, 64)
    )
    torch.testing.assert_close(plain, padded, atol=1e-5, rtol=1e-5)


def test_prompts_are_padded_to_the_multiple(tiny_pipeline):
    for multiple, length in ((None, 21), (32, 32), (64, 64)):
        prefix = tiny_pipeline.prepare_prefix(PROMPTS, (1, 4, 4), 1, None, multiple)
        assert prefix.attention_mask.shape == (4, length)
        assert prefix.cache.get_seq_length() == length


@pytest.mark.parametrize(("multiple", "lengths"), [(None, (21, 9)), (16, (32, 16))])
def test_a_long_prompt_does_not_lengthen_the_negative_prompt(tiny_pipeline, monkeypatch, multiple, lengths):
    prefill, seen = tiny_pipeline.model.prefill, []
    monkeypatch.setattr(
        tiny_pipeline.model, "prefill", lambda **inputs: seen.append(inputs["input_ids"].shape) or prefill(**inputs)
    )
    drawn(tiny_pipeline, PROMPTS, latents=gaussian(4), pad_to_multiple_of=multiple)
    assert seen == [(4, length) for length in reversed(lengths)]  # the negative prompts come first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5, expected a number from 0 to 1"),
        ({"guidance_rescale": -0.1}, "guidance_rescale=-0.1, expected a number from 0 to 1"),
        ({"guidance_rescale": None}, "guidance_rescale=None, expected a number"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0, expected an integer of at least 1"),
        ({"pad_to_multiple_of": 8.0}, "pad_to_multiple_of=8.0, expected an integer"),
    ],
)
def test_a_wrong_argument_is_named(tiny_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline("a cat", **arguments)
