"""The OpenUni kind under UniMRG, on small random models of transformers' and diffusers' classes."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors.torch import load_file
from transformers import InternVLConfig, InternVLForConditionalGeneration
from unified_run import (
    assert_adapters_are_what_was_trained,
    assert_frozen_and_trained,
    assert_losses_fall,
    bundle_of,
    tokenizer_with,
    unified_recipe,
)

from hydra_hf.training.adapters import UnifiedObjective, train_unified
from hydra_hf.training.adapters.openuni import OpenUniChatProcessor, OpenUniForUniMRG


TOKENS = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}


class Processor:
    """Only its tokenizer is asked for."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def save_pretrained(self, folder) -> None:
        self.tokenizer.save_pretrained(folder)


def small_parts(tokenizer):
    config = InternVLConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                       "image_size": 32, "patch_size": 4},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                     "max_position_embeddings": 512, "bos_token_id": None, "initializer_range": 0.1},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=16,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
        sample_size=8,
    )  # fmt: skip
    autoencoder = AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16), encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1), encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()), encoder_block_types="ResBlock", decoder_block_types="ResBlock",
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), transformer, autoencoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openuni")
    tokenizer = tokenizer_with(**TOKENS)
    torch.manual_seed(0)
    null_ids = tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<img>")["input_ids"]
    model = OpenUniForUniMRG.assemble(
        *small_parts(tokenizer), num_queries=16, num_connector_layers=1, num_connector_heads=2, null_prompt_ids=null_ids,
        num_inference_steps=8,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(checkpoint):
    vlm_config = OpenUniForUniMRG.config_class.from_pretrained(checkpoint).vlm_config
    processor = OpenUniChatProcessor.from_internvl(Processor(tokenizer_with(**TOKENS)), vlm_config, 64)
    return unified_recipe(OpenUniForUniMRG, checkpoint, processor)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    return train_unified(recipe, tmp_path_factory.mktemp("run"))


@pytest.fixture
def model(checkpoint) -> OpenUniForUniMRG:
    return OpenUniForUniMRG.from_pretrained(checkpoint).eval()


@pytest.fixture
def painting(recipe, model) -> dict:
    return UnifiedObjective(recipe.stages[0], recipe.seed).prepare(model, bundle_of(recipe), "depth")


def test_all_four_losses_fall(recipe, checkpoint, finished):
    assert_losses_fall(checkpoint, finished, recipe, factor=0.9)


def test_frozen_modules_stay_and_all_others_move(checkpoint, finished):
    assert_frozen_and_trained(*map(OpenUniForUniMRG.from_pretrained, (checkpoint, finished)))


def test_the_four_parts_are_saved_and_opened_as_one(tmp_path):
    tokenizer = tokenizer_with(**TOKENS)
    parts = small_parts(tokenizer)
    model = OpenUniForUniMRG.assemble(*parts, num_queries=16, num_connector_layers=1, num_connector_heads=2)
    model.save_pretrained(tmp_path)
    opened = OpenUniForUniMRG.from_pretrained(tmp_path)
    for part, name in zip(parts, ("vlm", "transformer", "autoencoder")):
        for key, value in part.state_dict().items():
            assert torch.equal(opened.state_dict()[f"{name}.{key}"], value), key
    weights = opened.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_noise_is_the_rows_own(model, painting):
    loss = model(**painting).loss
    again = {**painting, "generators": [torch.Generator().manual_seed(seed) for seed in (0, 1)]}
    rows = []
    for row in (0, 1):
        one = {name: value[row : row + 1] for name, value in again.items() if name != "generators"}
        rows.append(model(**one, generators=[torch.Generator().manual_seed(row)]).loss)
    torch.testing.assert_close(model(**again).loss, torch.stack(rows).mean(), rtol=1e-4, atol=1e-5)
    assert loss != rows[0]


def test_guidance_moves_away_from_the_null_prompt(model, painting):
    inputs = {name: painting[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    plain, same, guided = (
        model.generate_images(**inputs, guidance_scale=scale, generator=torch.Generator().manual_seed(0))
        for scale in (1.0, 1.0 + 1e-7, 4.0)
    )
    torch.testing.assert_close(plain, same, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, guided, atol=1e-3)
    model.config.null_prompt_ids = []
    with pytest.raises(ValueError, match="without null_prompt_ids"):
        model.generate_images(**inputs, guidance_scale=2.0, generator=torch.Generator())


def test_a_table_of_positions_is_refused(model):
    config = model.config
    config.transformer_config = {**config.transformer_config, "interpolation_scale": 1}
    with pytest.raises(ValueError, match="interpolation_scale"):
        OpenUniForUniMRG(config)


def test_internvl_sees_its_own_size_and_statistics(model):
    white = model.to_internvl(torch.ones(1, 3, 64, 64))
    assert white.shape == (1, 3, 32, 32)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(white[0, :, 0, 0], expected)


def test_a_resumed_run_ends_as_the_uninterrupted_one(recipe, tmp_path):
    stage = replace(recipe.stages[0], num_steps=4)
    recipe = replace(recipe, stages=(stage,), save_every=2)
    whole = train_unified(recipe, tmp_path / "whole")
    (tmp_path / "killed" / "unimrg").mkdir(parents=True)
    (tmp_path / "whole" / "unimrg" / "checkpoint-2").rename(tmp_path / "killed" / "unimrg" / "checkpoint-2")
    again = train_unified(recipe, tmp_path / "killed")
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, again))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_adapters_are_saved_with_the_heads_and_give_the_trained_loss(recipe, tmp_path):
    pytest.importorskip("peft")
    assert_adapters_are_what_was_trained(recipe, tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_the_source_says_what_is_painted(recipe, tmp_path):
    """With the images of a batch swapped, the loss rises. Of `reconstruct` it does not: so small a random model overfits that
    task from the noisy image alone, and painted maps do not follow a swapped source either."""
    stage = replace(recipe.stages[0], num_steps=1500, decay_share=0.8)
    with torch.enable_grad():
        final = train_unified(replace(recipe, stages=(stage,)), tmp_path)
    model, objective = OpenUniForUniMRG.from_pretrained(final).eval(), UnifiedObjective(stage, recipe.seed)
    for task in ("depth", "segment"):
        inputs = objective.prepare(model, bundle_of(recipe), task)
        losses = []
        for images in (inputs["pixel_values"], inputs["pixel_values"].flip(0)):
            total = 0.0
            for draw in range(16):
                generators = [torch.Generator().manual_seed(2 * draw + row) for row in range(2)]
                total += model(**{**inputs, "pixel_values": images, "generators": generators}).loss.item()
            losses.append(total)
        assert losses[1] > 1.2 * losses[0], (task, losses)
