"""The Harmon kind under UniMRG, on a stand-in with the interface of its published code (`harmon_stand_in`)."""

from dataclasses import replace

import pytest
import torch
from harmon_stand_in import HarmonStandInConfig, HarmonStandInForUniMRG
from unified_run import (
    assert_adapters_are_what_was_trained,
    assert_frozen_and_trained,
    assert_losses_fall,
    assert_painted_follows_source,
    bundle_of,
    unified_recipe,
)

from hydra_hf.training.adapters import UnifiedObjective, train_unified
from hydra_hf.training.adapters.harmon import HarmonChatProcessor, rounds
from toy_models import toy_tokenizer


NULL_PROMPT = "<|im_start|>user\ngenerate an image.<|im_end|>\n<|im_start|>assistant\n"
HarmonStandInForUniMRG.image_token_id = toy_tokenizer().convert_tokens_to_ids("<|image_pad|>")
HarmonStandInForUniMRG.null_prompt_ids = tuple(toy_tokenizer()(NULL_PROMPT)["input_ids"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harmon")
    torch.manual_seed(0)
    HarmonStandInForUniMRG(HarmonStandInConfig(vocab_size=len(toy_tokenizer()))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(checkpoint):
    processor = HarmonChatProcessor.from_tokenizer(toy_tokenizer(), image_size=64, num_image_tokens=16 + 4)
    return unified_recipe(HarmonStandInForUniMRG, checkpoint, processor)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    return train_unified(recipe, tmp_path_factory.mktemp("run"))


@pytest.fixture
def model(checkpoint) -> HarmonStandInForUniMRG:
    return HarmonStandInForUniMRG.from_pretrained(checkpoint).eval()


@pytest.fixture
def painting(recipe, model) -> dict:
    return UnifiedObjective(recipe.stages[0], recipe.seed).prepare(model, bundle_of(recipe), "depth")


def test_all_four_losses_fall(recipe, checkpoint, finished):
    assert_losses_fall(checkpoint, finished, recipe, factor=0.8)


def test_frozen_modules_stay_and_all_others_move(checkpoint, finished):
    assert_frozen_and_trained(*map(HarmonStandInForUniMRG.from_pretrained, (checkpoint, finished)))


def test_tokens_are_patches_of_the_latents_and_come_back(model):
    pixels = torch.nn.functional.interpolate(torch.rand(2, 1, 16, 32), scale_factor=4).expand(-1, 3, -1, -1) * 2 - 1
    for patch_size in (1, 2):
        model.mar.patch_size = patch_size
        tokens, grid = model.encode_tokens(pixels)
        assert grid == (4 // patch_size, 8 // patch_size)
        assert tokens.shape == (2, grid[0] * grid[1], 16 * patch_size**2)
        torch.testing.assert_close(model.decode_tokens(tokens, grid), pixels)


def test_the_gradient_into_the_seeing_encoder_is_a_tenth(recipe, model):
    inputs = UnifiedObjective(recipe.stages[0], recipe.seed).prepare(model, bundle_of(recipe), "understand")
    gradients = []
    for scale in (1.0, 0.1):
        model.condition_grad_scale = scale
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append((model.mar.z_proj.weight.grad, model.llm.model.norm.weight.grad))
    torch.testing.assert_close(gradients[0][0] * 0.1, gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


def test_masked_tokens_are_not_seen(model, painting):
    """The loss's condition of every token depends on the visible ones alone."""
    tokens, grid = model.encode_tokens(painting["target_pixel_values"])
    masked = torch.tensor([[0, 3, 5], [1, 2, 7]])
    prompt = {
        "inputs_embeds": model.embed_prompts(painting["input_ids"]),
        "attention_mask": painting["attention_mask"],
    }
    other = tokens.scatter(1, masked[..., None].expand(-1, -1, tokens.shape[-1]), 9.0)
    condition, same = (model.read_masked(each, grid, masked, **prompt) for each in (tokens, other))
    torch.testing.assert_close(condition, same)
    assert not torch.allclose(condition, model.read_masked(tokens + 1, grid, masked, **prompt))


def test_a_round_leaves_fewer_tokens_and_the_last_none():
    for num_tokens, num_rounds in ((16, 8), (1024, 32), (4, 9)):
        pairs = rounds(num_tokens, num_rounds)
        assert pairs[0][0] == num_tokens
        assert pairs[-1][1] == 0
        assert all(before > after for before, after in pairs)
        assert [after for _, after in pairs[:-1]] == [before for before, _ in pairs[1:]]


def test_a_drawn_image_is_a_function_of_prompt_source_and_generator(model, painting):
    inputs = {name: painting[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    def draw(seed: int = 0, scale: float = 1.0, **changes) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate_images(**inputs | changes, guidance_scale=scale, generator=generator)

    torch.manual_seed(1)
    drawn = draw()
    torch.manual_seed(2)
    assert torch.equal(drawn, draw())
    assert not torch.equal(drawn, draw(seed=1))
    assert not torch.equal(drawn, draw(pixel_values=inputs["pixel_values"].flip(0)))
    assert not torch.equal(drawn, draw(scale=3.0))
    model.null_prompt_ids = ()
    with pytest.raises(ValueError, match="null_prompt_ids has 0 tokens"):
        draw(scale=3.0)


def test_adapters_are_saved_with_the_heads_and_give_the_trained_loss(recipe, tmp_path):
    pytest.importorskip("peft")
    assert_adapters_are_what_was_trained(recipe, tmp_path)


@pytest.mark.slow
def test_painted_maps_follow_the_source(recipe, tmp_path):
    stage = replace(recipe.stages[0], num_steps=400)
    model = HarmonStandInForUniMRG.from_pretrained(train_unified(replace(recipe, stages=(stage,)), tmp_path))

    def distance(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (model.encode_tokens(painted)[0] - model.encode_tokens(target)[0]).square().mean(dim=(1, 2))

    for task in ("reconstruct", "depth", "segment"):
        assert_painted_follows_source(model, recipe, task, distance)
