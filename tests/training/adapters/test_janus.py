"""Janus under UniMRG, on small random models of transformers' classes."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForMultimodalLM,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)
from unified_run import (
    LOSSES,
    TASKS,
    assert_adapters_are_what_was_trained,
    assert_frozen_and_trained,
    assert_losses_fall,
    assert_painted_follows_source,
    bundle_of,
    rows_of,
    tokenizer_with,
    unified_recipe,
)

from hydra_hf.training.adapters import UnifiedObjective, train_unified
from hydra_hf.training.adapters.janus import JanusChatProcessor, JanusForUniMRG


TOKENS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
NUM_IMAGE_TOKENS = 16


def small_config(tokenizer) -> JanusConfig:
    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16, projection_dim=48,
        num_image_tokens=NUM_IMAGE_TOKENS, mlp_ratio=2.0,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=64, latent_channels=16, base_channels=32, channel_multiplier=[1, 1, 1, 1, 1],
        num_res_blocks=1, projection_dim=48, image_token_embed_dim=48, num_patches=4,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    return JanusConfig(
        vision_config=vision, vq_config=vq, text_config=text, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as the Hub has it: plain classes of transformers."""
    folder = tmp_path_factory.mktemp("janus")
    tokenizer = tokenizer_with(**TOKENS)
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(small_config(tokenizer))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    image_processor = JanusImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 64, "width": 64})
    JanusProcessor(image_processor, tokenizer, num_image_tokens=NUM_IMAGE_TOKENS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(checkpoint):
    processor = JanusChatProcessor.from_janus(JanusProcessor.from_pretrained(checkpoint), 64, 16)
    return unified_recipe(JanusForUniMRG, checkpoint, processor)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train_unified(recipe, folder), folder / "unimrg"


@pytest.fixture
def model(checkpoint) -> JanusForUniMRG:
    return JanusForUniMRG.from_pretrained(checkpoint).eval()


@pytest.fixture
def painting(recipe, model) -> dict:
    """What the model is trained with to paint a depth map."""
    return UnifiedObjective(recipe.stages[0], recipe.seed).prepare(model, bundle_of(recipe), "depth")


def test_all_four_losses_fall(recipe, checkpoint, finished):
    assert_losses_fall(checkpoint, finished[0], recipe, factor=0.8)
    rows = rows_of(finished[1])
    assert set(LOSSES) <= set(rows[0])


def test_frozen_modules_stay_and_all_others_move(checkpoint, finished):
    assert_frozen_and_trained(*map(JanusForUniMRG.from_pretrained, (checkpoint, finished[0])))


def test_the_finished_folder_is_one_of_transformers(finished):
    folder, stage_folder = finished
    assert type(AutoModelForMultimodalLM.from_pretrained(folder)) is JanusForConditionalGeneration
    assert JanusConfig.from_pretrained(folder).architectures == ["JanusForConditionalGeneration"]
    assert JanusProcessor.from_pretrained(folder).image_token == "<image_placeholder>"
    for task in ("reconstruct", "depth", "segment"):
        assert (stage_folder / f"{task}-000030.png").is_file()


def test_a_chat_is_written_as_janus_writes_it(recipe):
    processor, image = recipe.processor, torch.zeros(3, 64, 64)
    question = [{"type": "image", "image": image}, {"type": "text", "text": "what color?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    batch = processor.encode_conversations([messages])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    image_text = "<begin_of_image>" + "<image_placeholder>" * NUM_IMAGE_TOKENS + "<end_of_image>"
    expected = f"<|user|>: {image_text}\nwhat color?\n\n<|assistant|>: red<|im_end|>"
    assert text.replace(" ", "") == expected.replace(" ", "")
    labelled = batch["input_ids"][0][batch["assistant_masks"][0].bool()]
    assert processor.tokenizer.decode(labelled).replace(" ", "") == "red<|im_end|>"


def test_a_prompt_to_paint_ends_with_the_start_of_the_image(recipe, painting):
    start = recipe.processor.tokenizer.convert_tokens_to_ids("<begin_of_image>")
    assert (painting["input_ids"][:, -1] == start).all()
    assert set(painting) == {"input_ids", "attention_mask", "pixel_values", "target_pixel_values", "generators"}
    assert painting["pixel_values"].shape == painting["target_pixel_values"].shape == (TASKS["depth"], 3, 64, 64)


def test_codes_are_the_nearest_by_direction_as_the_decoder_reads_them(model, painting):
    pixel_values, vqmodel = painting["pixel_values"], model.model.vqmodel
    codes = model.encode_codes(pixel_values)
    latents = vqmodel.quant_conv(vqmodel.encoder(pixel_values)).permute(0, 2, 3, 1).flatten(0, 2)
    entries = vqmodel.quantize.embedding.weight
    distances = torch.cdist(torch.nn.functional.normalize(latents), torch.nn.functional.normalize(entries))
    assert torch.equal(codes.flatten(), distances.argmin(dim=1))
    assert not torch.equal(codes.flatten(), vqmodel.encode(pixel_values).image_tokens.flatten())  # theirs


def test_the_image_loss_is_the_cross_entropy_of_codes_one_after_the_other(model, painting):
    painting.pop("generators")
    codes, losses = model.encode_codes(painting["target_pixel_values"]), []
    embeds, mask = model.embed_prompts(painting["input_ids"], painting["pixel_values"]), painting["attention_mask"]
    for index in range(NUM_IMAGE_TOKENS):
        seen = torch.cat([embeds, model.prepare_embeddings_for_image_generation(codes[:, :index])], dim=1)
        seen_mask = torch.nn.functional.pad(mask, (0, index), value=1)
        states = model.model.language_model(inputs_embeds=seen, attention_mask=seen_mask).last_hidden_state
        logits = model.model.generation_head(states[:, -1])
        losses.append(torch.nn.functional.cross_entropy(logits, codes[:, index]))
    torch.testing.assert_close(model(**painting).loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_codes_are_sampled_from_what_is_seen_with_and_without_a_cache(model, painting, guidance_scale):
    inputs = {name: painting[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    sampled = model.sample_codes(**inputs, guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(0))
    generator, codes = torch.Generator().manual_seed(0), torch.zeros(2, 0, dtype=torch.long)
    embeds, mask = model.embed_prompts(inputs["input_ids"], inputs["pixel_values"]), inputs["attention_mask"]
    null_ids = inputs["input_ids"].clone()
    for row in range(2):
        null_ids[row, int(mask[row].argmax()) + 1 : -1] = model.generation_config.pad_token_id
    null_embeds = model.get_input_embeddings()(null_ids)

    def logits_of(prompt: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([prompt, model.prepare_embeddings_for_image_generation(codes)], dim=1)
        seen_mask = torch.nn.functional.pad(mask, (0, codes.shape[1]), value=1)
        states = model.model.language_model(inputs_embeds=seen, attention_mask=seen_mask).last_hidden_state
        return model.model.generation_head(states[:, -1])

    for _ in range(NUM_IMAGE_TOKENS):
        logits, null_logits = logits_of(embeds), logits_of(null_embeds)
        guided = null_logits + guidance_scale * (logits - null_logits)
        codes = torch.cat([codes, torch.multinomial(guided.softmax(-1), 1, generator=generator)], dim=1)
    assert torch.equal(sampled, codes)
    swapped = model.sample_codes(
        **inputs | {"pixel_values": inputs["pixel_values"].flip(0)}, guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert not torch.equal(sampled, swapped)


def test_the_codes_do_not_depend_on_dropout_of_the_autoencoder(model):
    model.train()
    assert model.training
    assert not any(module.training for module in model.model.vqmodel.modules())


def test_answers_are_generated_as_by_the_class_of_transformers(recipe, checkpoint, model):
    inputs = UnifiedObjective(recipe.stages[0], recipe.seed).prepare(model, bundle_of(recipe), "understand")
    inputs.pop("labels")
    plain = JanusForConditionalGeneration.from_pretrained(checkpoint).eval()
    answers = [each.generate(**inputs, max_new_tokens=3, do_sample=False) for each in (model, plain)]
    assert torch.equal(*answers)


def test_adapters_are_saved_with_the_heads_and_give_the_trained_loss(recipe, tmp_path):
    pytest.importorskip("peft")
    assert_adapters_are_what_was_trained(recipe, tmp_path)


def test_pixels_in_other_statistics_are_refused(checkpoint):
    own = JanusProcessor.from_pretrained(checkpoint)
    own.image_processor.image_mean = [0.48, 0.46, 0.41]
    with pytest.raises(ValueError, match=r"mean \[0.48, 0.46, 0.41\] .* expected 0.5"):
        JanusChatProcessor.from_janus(own, 64, 16)


@pytest.mark.slow
def test_painted_maps_follow_the_source(recipe, tmp_path):
    stage = replace(recipe.stages[0], num_steps=150)
    final = train_unified(replace(recipe, stages=(stage,)), tmp_path)
    model = JanusForUniMRG.from_pretrained(final)

    def wrong_codes(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        expected = model.model.vqmodel.decode(model.encode_codes(target))  # the best that can be painted
        return (painted - expected).abs().mean(dim=(1, 2, 3))

    for task in ("reconstruct", "depth", "segment"):
        assert_painted_follows_source(model, recipe, task, wrong_codes)
