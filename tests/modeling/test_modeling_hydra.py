import copy
from threading import Thread

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    IMAGE,
    PATCH,
    START,
    gaussian,
    hydra_config,
    hydra_model,
    left_padded,
    pictures,
    sequence,
    tok_config,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import DynamicCache, StaticCache

from hydra_hf import HydraConfig, HydraForConditionalGeneration, HydraModel, HydraTokConfig, PixelViTDecoderConfig
from hydra_hf.modeling.compat import enable_checkpointing
from hydra_hf.modeling.flow import add_noise, velocity_target
from hydra_hf.modeling.grid import get_image_block_ids, latents_to_tokens, pack_latents
from hydra_hf.modeling.image_generation import GuidanceBranch, ImagePrefix, classifier_free
from hydra_hf.modeling.layers import ZeroLinear
from hydra_hf.modeling.prefix_cache import FrozenPrefixCache
from hydra_hf.modeling.projector import MultiModalProjector


TEXTS = ["qwen2", "qwen3", "llama"]
IMPLEMENTATIONS = ["sdpa", "eager"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=TEXTS)
def model(request) -> HydraForConditionalGeneration:
    return hydra_model(request.param)


@pytest.fixture(scope="module")
def qwen() -> HydraForConditionalGeneration:
    return hydra_model()


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def projector(**changes) -> MultiModalProjector:
    torch.manual_seed(0)
    return MultiModalProjector(hydra_config(**changes))


def test_the_projector_says_the_same_of_equal_states_wherever_they_stand():
    embeds = projector()(torch.ones(1, 6, 24).cumsum(-1))
    torch.testing.assert_close(embeds, embeds[:, :1].expand_as(embeds))


# The mask


def seen(model, input_ids: Tensor, latents: Tensor) -> str:
    """A picture of who sees whom: 1 where a change of the token of that column reaches the token of that row.

    The model has no time token and reads the bottleneck's latents, so that an image token is one token of the input.
    """

    def states(ids, latents):
        sigma = torch.full((len(latents),), 0.5)
        return model.model(input_ids=ids, latents=latents, sigma=sigma).last_hidden_state[0]

    before = states(input_ids, latents)
    rows = ["" for _ in before]
    places = [divmod(index, latents.shape[-1]) for index in range(len(latents) * latents.shape[-1])]
    for column, token in enumerate(input_ids[0].tolist()):
        ids, changed_latents = input_ids.clone(), latents.clone()
        if token == IMAGE:
            image, place = places.pop(0)
            changed_latents[image, :, 0, place] += gaussian(latents.shape[1], seed=column)
        else:
            ids[0, column] = token + 1 if token < START else 5
        change = (states(ids, changed_latents) - before).abs().amax(-1) > 1e-4
        rows = [row + (" 1" if reached else " .") for row, reached in zip(rows, change.tolist())]
    return "\n".join(row.strip() for row in rows)


def drawn(picture: str) -> str:
    return "\n".join(line.strip() for line in picture.splitlines())


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_causal_and_an_image_sees_all_of_itself(text, attn_implementation):
    model = hydra_model(text, 0, attn_implementation, use_time_token=False, llm_visual_input="latent")
    input_ids = torch.tensor([[7, IMAGE, IMAGE, IMAGE, 9]])
    assert seen(model, input_ids, gaussian(1, 6, 1, 3)) == drawn(
        """1 . . . .
           1 1 1 1 .
           1 1 1 1 .
           1 1 1 1 .
           1 1 1 1 1"""
    )


def test_of_two_adjacent_images_the_earlier_does_not_see_the_later():
    model = hydra_model(use_time_token=False, llm_visual_input="latent")
    input_ids = torch.tensor([sequence("image", "image", 9, num_tokens=2)])
    assert seen(model, input_ids, gaussian(2, 6, 1, 2)) == drawn(
        """1 . . . . . . . .
           1 1 1 . . . . . .
           1 1 1 . . . . . .
           1 1 1 1 . . . . .
           1 1 1 1 1 . . . .
           1 1 1 1 1 1 1 . .
           1 1 1 1 1 1 1 . .
           1 1 1 1 1 1 1 1 .
           1 1 1 1 1 1 1 1 1"""
    )


def test_block_ids_count_the_images_of_each_row_from_0():
    types = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 0]])
    assert get_image_block_ids(types).tolist() == [[-1, 0, 0, -1, 1, 1], [-1, -1, -1, 0, 0, -1]]
    assert get_image_block_ids(types, past_length=2).tolist() == [
        [-1, -1, -1, 0, 0, -1, 1, 1],
        [-1, -1, -1, -1, -1, 0, 0, -1],
    ]


def test_a_later_image_does_not_change_the_text_before_it(qwen):
    input_ids = torch.tensor([sequence(1, "image", 2, 3, "image", 4)])
    first, second = pictures(2, seed=1), pictures(2, seed=2)
    second[0] = first[0]
    a, b = (qwen(input_ids=input_ids, pixel_values=pixels).logits[0] for pixels in (first, second))
    torch.testing.assert_close(a[:11], b[:11], **CLOSE)
    assert (a[11:] - b[11:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("attn_implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()  # flex attention has no gradient on a CPU
def test_every_attention_implementation_gives_the_same(model, attn_implementation):
    other = hydra_model(model.config.text_config.model_type, 0, attn_implementation)
    assert other.vision_head.layers[0].attention.config._attn_implementation == attn_implementation
    inputs = left_padded([sequence(1, 2, "image", 3, "image", 4), sequence("image", 5)])
    latents, sigma = gaussian(3, 6, 2, 2), torch.tensor([0.0, 0.7, 0.3])
    a, b = (
        each(**inputs, latents=latents, sigma=sigma, is_generated=torch.tensor([False, True, True]))
        for each in (model, other)
    )
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(a.logits[mask], b.logits[mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a.velocity, b.velocity, atol=1e-4, rtol=1e-4)


# Inputs


def test_a_given_image_is_a_generated_image_at_sigma_0(model):
    input_ids = torch.tensor([sequence(1, "image", 2, "image", 3)])
    given = model(input_ids=input_ids, pixel_values=pictures(2)).logits
    latents = model.encode_images(pictures(2))
    generated = model(input_ids=input_ids, latents=latents, sigma=torch.zeros(2)).logits
    assert torch.equal(given, generated)
    noised = model(input_ids=input_ids, latents=latents, sigma=torch.tensor([0.0, 0.5])).logits
    assert torch.equal(given[:, :8], noised[:, :8])
    assert not torch.allclose(given, noised)


def test_the_time_token_can_be_left_out():
    model = hydra_model(use_time_token=False)
    input_ids = torch.tensor([sequence(1, "image", 2, num_tokens=4)])
    latents = gaussian(1, 6, 2, 2)
    a, b = (model(input_ids=input_ids, latents=latents, sigma=torch.tensor([sigma])).logits for sigma in (0.0, 1.0))
    assert torch.equal(a, b)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_ragged_batch_with_several_images_equals_its_samples_alone(model, padding):
    rows = [sequence(1, "image", 2, "image", 3), sequence(4, 5, 6), sequence("image", 7, 8)]
    inputs = left_padded(rows)
    if padding == "right":
        inputs = {name: torch.stack([_moved_left(row) for row in value]) for name, value in inputs.items()}
    mask = inputs["attention_mask"].bool()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    latents, sigma = gaussian(3, 6, 2, 2), torch.tensor([0.2, 0.7, 0.0])
    together = model(**inputs, latents=latents, sigma=sigma, is_generated=torch.tensor([True, True, True]))
    start = 0
    for index, row in enumerate(rows):
        images = slice(start, start := start + row.count(START))
        pixels = {"latents": latents[images], "sigma": sigma[images]} if START in row else {}
        alone = model(input_ids=torch.tensor([row]), **pixels)
        torch.testing.assert_close(together.logits[index][mask[index]], alone.logits[0], **CLOSE)
        if pixels:
            alone = model(input_ids=torch.tensor([row]), **pixels, is_generated=torch.ones_like(sigma[images]).bool())
            torch.testing.assert_close(together.velocity[images], alone.velocity, **CLOSE)


def _moved_left(row: Tensor) -> Tensor:
    """A left-padded row, padded on the right instead."""
    start = int((row != 0).nonzero()[0])
    return row.roll(-start)


def test_missing_mm_token_type_ids_are_found_in_the_ids(qwen):
    input_ids = torch.tensor([sequence(1, "image", 2)])
    given = qwen(input_ids=input_ids, pixel_values=pictures(1), mm_token_type_ids=(input_ids == IMAGE).long())
    found = qwen(input_ids=input_ids, pixel_values=pictures(1))
    assert torch.equal(given.logits, found.logits)


def test_inputs_embeds_are_read_as_input_ids(qwen):
    input_ids = torch.tensor([sequence(1, "image", 2)])
    embeds = qwen.get_input_embeddings()(input_ids)
    by_ids = qwen(input_ids=input_ids, pixel_values=pictures(1)).logits
    assert torch.equal(qwen(inputs_embeds=embeds, pixel_values=pictures(1)).logits, by_ids)


def test_jumps_in_the_positions_are_not_read_as_packed_sequences(qwen):
    input_ids = torch.tensor([sequence(1, 2, "image", 3)])
    positions = torch.tensor([[0, 1, 2, 3, 3, 3, 3, 3, 4, 5]])  # one position for the whole image
    kwargs = {"input_ids": input_ids, "pixel_values": pictures(1), "position_ids": positions}
    with_mask = qwen(**kwargs, attention_mask=torch.ones_like(input_ids)).logits
    torch.testing.assert_close(qwen(**kwargs).logits, with_mask, **CLOSE)
    changed = qwen(**{**kwargs, "input_ids": input_ids.masked_fill(input_ids == 1, 9)}).logits
    assert ((changed - with_mask).abs().amax(-1) > 1e-4).all()  # all still see the first token


def test_encoded_images_can_be_given_instead_of_pixels(qwen):
    input_ids = torch.tensor([sequence(1, "image", 2)])
    features = qwen.get_image_features(pictures(1))
    assert features.pooler_output.shape == (1, 5, 32)
    by_features = qwen(input_ids=input_ids, mm_encoder_outputs={"image": features}).logits
    assert torch.equal(by_features, qwen(input_ids=input_ids, pixel_values=pictures(1)).logits)


def test_image_features_carry_the_states_of_the_tower(qwen):
    features = qwen.get_image_features(pictures(2), output_hidden_states=True)
    tower = qwen.model.vision_tower(pictures(2), output_hidden_states=True)
    assert torch.equal(features.last_hidden_state, tower.last_hidden_state)
    assert len(features.hidden_states) == len(tower.hidden_states) == 5
    tokens, grids = pack_latents(qwen.encode_images(pictures(2)), None)
    embeds = qwen.model.get_image_embeds(tokens, torch.zeros(2), grids)
    torch.testing.assert_close(features.pooler_output, embeds.unflatten(0, (2, -1)), **CLOSE)
    input_ids = torch.tensor([sequence(1, "image", "image", 2)])
    outputs = qwen(input_ids=input_ids, pixel_values=pictures(2), output_hidden_states=True)
    assert torch.equal(outputs.image_outputs.hidden_states[-1], tower.hidden_states[-1])


@pytest.mark.parametrize("shape", [(1, 10), (3, 10), (2, 9), (10,)])
def test_token_types_of_another_shape_are_refused(qwen, shape):
    ids = torch.tensor([sequence(1, "image", 2, 3)] * 2)
    with pytest.raises(ValueError, match=r"mm_token_type_ids \(.*\) must be \(2, 10\)"):
        qwen(input_ids=ids, pixel_values=pictures(2), mm_token_type_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("scale", [255.0, 2.0])
def test_questions_about_pixels_outside_their_range_are_refused(qwen, scale):
    ids = torch.tensor([sequence(1, "image", 2)])
    with pytest.raises(ValueError, match=r"range from .* expected pixels in \[-1, 1\]"):
        qwen(input_ids=ids, pixel_values=scale * torch.ones(1, 3, 8, 8))


@pytest.mark.parametrize(("height", "width"), [(4, 12), (16, 8)])
def test_images_of_any_size_are_read(qwen, height, width):
    num_tokens = 1 + height * width // PATCH**2
    input_ids = torch.tensor([sequence(1, "image", 2, num_tokens=num_tokens)])
    latents = qwen.encode_images(pictures(1, height, width))
    output = qwen(input_ids=input_ids, latents=latents, sigma=torch.ones(1), is_generated=torch.tensor([True]))
    assert output.velocity.shape == latents.shape == (1, 6, height // PATCH, width // PATCH)


BAD_INPUTS = {
    "too few placeholders": ({"pixel_values": (2,)}, r"runs of \[5\] image placeholders.*need runs of \[5, 5\]"),
    "another size": ({"pixel_values": (1, 12, 8)}, r"runs of \[5\] image placeholders.*need runs of \[7\]"),
    "no sigma": ({"latents": (1,)}, r"latents of 1 images need sigma of shape \(1,\), got None"),
    "two sigmas": ({"latents": (1,), "sigma": 2}, r"need sigma of shape \(1,\), got \(2,\)"),
    "given twice": ({"latents": (1,), "sigma": 1, "pixel_values": (1,)}, "Give images once"),
    "no latents": ({"pixel_values": (1,), "is_generated": 1}, r"is_generated \(1,\) needs latents.*got None"),
    "two marks": ({"latents": (1,), "sigma": 1, "is_generated": 2}, r"is_generated \(2,\) needs latents"),
    "no velocity": (
        {"latents": (1,), "sigma": 1, "velocity_target": 1},
        r"velocity_target \(1.*needs is_generated.*None",
    ),
    "two targets": (
        {"latents": (1,), "sigma": 1, "is_generated": 1, "velocity_target": 2},
        r"velocity_target \(2, 6, 2, 2\).*the velocity, got \(1, 6, 2, 2\)",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_images_that_do_not_fit_are_refused(qwen, name):
    kwargs, message = copy.copy(BAD_INPUTS[name][0]), BAD_INPUTS[name][1]
    build = {
        "pixel_values": lambda size: pictures(*size),
        "latents": lambda size: gaussian(size[0], 6, 2, 2),
        "sigma": lambda number: torch.full((number,), 0.5),
        "is_generated": lambda number: torch.ones(number, dtype=torch.bool),
        "velocity_target": lambda number: gaussian(number, 6, 2, 2),
    }
    kwargs = {key: build[key](value) for key, value in kwargs.items()}
    with pytest.raises(ValueError, match=message):
        qwen(input_ids=torch.tensor([sequence(1, "image", 2)]), **kwargs)


def test_ids_and_embeds_together_or_neither_are_refused(qwen):
    input_ids = torch.tensor([[1, 2]])
    for kwargs in ({}, {"input_ids": input_ids, "inputs_embeds": qwen.get_input_embeddings()(input_ids)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            qwen(**kwargs)


def test_flash_attention_is_refused():
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        HydraForConditionalGeneration._from_config(hydra_config(), attn_implementation="flash_attention_2")


# Losses


def training_batch() -> dict[str, Tensor]:
    inputs = left_padded([sequence(1, "image", 2, 3), sequence(4, "image", 5)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE, -100)
    labels[inputs["attention_mask"] == 0] = -100
    latents, noise, sigma = gaussian(2, 6, 2, 2, seed=1), gaussian(2, 6, 2, 2, seed=2), torch.tensor([0.0, 0.6])
    is_generated = torch.tensor([False, True])
    return {
        **inputs,
        "labels": labels,
        "latents": add_noise(latents, noise, sigma),
        "sigma": sigma,
        "is_generated": is_generated,
        "velocity_target": velocity_target(latents, noise)[is_generated],
    }


def test_the_losses_are_cross_entropy_and_mean_squared_error(model):
    batch = training_batch()
    output = model(**batch)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    language = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    flow = (output.velocity - batch["velocity_target"]).square().mean()
    torch.testing.assert_close(output.language_loss, language)
    torch.testing.assert_close(output.flow_loss, flow)
    torch.testing.assert_close(output.loss, language + flow)


def test_each_loss_stands_alone(qwen):
    batch = training_batch()
    both = qwen(**batch)
    language = qwen(**{key: value for key, value in batch.items() if key not in ("is_generated", "velocity_target")})
    flow = qwen(**{key: value for key, value in batch.items() if key != "labels"})
    assert torch.equal(language.loss, both.language_loss)
    assert language.flow_loss is None
    assert torch.equal(flow.loss, both.flow_loss)
    assert flow.language_loss is None
    assert qwen(input_ids=batch["input_ids"][:, :1]).loss is None


def test_velocity_is_of_the_generated_images_alone(qwen):
    batch = training_batch()
    both = qwen(**{**batch, "is_generated": torch.tensor([True, True]), "velocity_target": None}).velocity
    torch.testing.assert_close(qwen(**batch).velocity, both[1:], **CLOSE)


def test_marking_no_image_as_generated_is_refused(qwen):
    batch = training_batch()
    batch |= {"is_generated": torch.tensor([False, False]), "velocity_target": batch["velocity_target"][:0]}
    with pytest.raises(ValueError, match="marks none of 2 images"):  # the loss of no image would be NaN
        qwen(**batch)


def test_velocity_sees_the_prompt_and_the_noise_level(qwen):
    batch = training_batch()
    before = qwen(**batch).velocity
    prompt = qwen(**{**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 4, 9)}).velocity
    level = qwen(**{**batch, "sigma": torch.tensor([0.0, 0.7])}).velocity
    assert (prompt - before).abs().max() > 1e-3
    assert (level - before).abs().max() > 1e-3


def test_the_vision_head_reads_the_noise_level_by_itself():
    model = hydra_model(use_time_token=False)
    inputs = {"input_ids": torch.tensor([sequence(1, "image", 2, num_tokens=4)]), "latents": gaussian(1, 6, 2, 2)}
    low, high = (
        model(**inputs, sigma=torch.tensor([sigma]), is_generated=torch.tensor([True])).velocity
        for sigma in (0.2, 0.9)
    )
    assert (low - high).abs().max() > 1e-3


@pytest.mark.parametrize("use_latent_skip", [True, False])
def test_the_vision_head_reads_the_noisy_latents_only_with_the_skip(use_latent_skip):
    head = hydra_config().vision_head_config.to_dict() | {"use_latent_skip": use_latent_skip}
    vision_head = hydra_model(vision_head_config=head).vision_head
    states, sigma = gaussian(1, 4, 32), torch.tensor([0.5])
    a, b = (vision_head(states, gaussian(1, 4, 6, seed=seed), sigma, [(1, 2, 2)]) for seed in (0, 1))
    assert torch.equal(a, b) != use_latent_skip


def test_training_reaches_every_parameter_that_the_two_losses_read():
    model = hydra_model().train()
    model(**training_batch()).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    read = [name for name in without if "gen_vit" not in name and "pixel_decoder" not in name]
    assert sorted(read) == [f"model.vision_tower.bottleneck.{part}_proj.{kind}" for part in ("decoder_up", "down")
                            for kind in ("bias", "weight")]  # fmt: skip


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = hydra_model().train()
        if checkpointing:
            enable_checkpointing(model)
        model(**training_batch(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, **CLOSE)


def test_accumulating_single_samples_gives_the_gradient_of_the_full_batch(tmp_path):
    row = torch.tensor(sequence(1, "image", 2, 3))
    ids = torch.stack([row, row.masked_fill(row == 1, 5), row.masked_fill(row == 2, 6), row.masked_fill(row == 3, 7)])
    latents, targets = gaussian(4, 6, 2, 2, seed=1), gaussian(4, 6, 2, 2, seed=2)
    samples = [
        {"input_ids": ids[index], "labels": ids[index].masked_fill(ids[index] >= IMAGE, -100),
         "latents": latents[index], "sigma": torch.tensor(0.6), "is_generated": torch.tensor(True),
         "velocity_target": targets[index]}
        for index in range(4)
    ]  # fmt: skip
    weights = []
    for accumulation in (1, 4):
        model = hydra_model()
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
            max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=1e9, lr_scheduler_type="constant",
            remove_unused_columns=False, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        collate = lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]}  # noqa: E731
        trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples, data_collator=collate)
        trainer.train()
        expected = model.eval()(**collate(samples)).loss.item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        weights.append(dict(model.named_parameters()))
    start = dict(hydra_model().named_parameters())
    moved = (weights[0]["vision_head.out_proj.weight"] - start["vision_head.out_proj.weight"]).abs().max()
    assert moved > 1e-3
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, msg=name, **CLOSE)


# Text


def prompt() -> dict[str, Tensor]:
    input_ids = torch.tensor([sequence(1, 2, "image", 3, "image", 4)])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).long(),
        "pixel_values": pictures(2),
    }


def answer(model, inputs: dict, **kwargs) -> Tensor:
    defaults = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **{**defaults, **kwargs})


def test_generate_with_a_cache_equals_generate_without(model):
    cached, uncached = answer(model, prompt()), answer(model, prompt(), use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **CLOSE)


def test_generate_takes_the_most_likely_token_of_forward(qwen):
    output = answer(qwen, prompt())
    inputs = {**prompt(), "input_ids": output.sequences[:, :-1]}
    del inputs["attention_mask"], inputs["mm_token_type_ids"]
    logits = qwen(**inputs).logits[0, -6:]
    torch.testing.assert_close(torch.cat(output.logits), logits, **CLOSE)
    assert torch.equal(logits.argmax(-1), output.sequences[0, -6:])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_static_cache_gives_the_answer_of_a_dynamic_one(model, name):
    dynamic = answer(model, prompt())
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    static = answer(model, prompt(), **{name: cache}, disable_compile=True)
    assert torch.equal(dynamic.sequences, static.sequences)
    torch.testing.assert_close(torch.stack(dynamic.logits), torch.stack(static.logits), **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_turn_with_an_image_goes_on_from_the_cache(model, kind):
    config = model.config.text_config
    cache = StaticCache(config=config, max_cache_len=64) if kind == "static" else DynamicCache(config=config)
    first = answer(model, prompt(), cache=cache, disable_compile=True).sequences
    turn = torch.tensor([sequence(8, "image", 9)])
    ids = torch.cat([first, turn], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long() * (torch.arange(ids.shape[1]) >= 0),
    }
    image = pictures(1, seed=5)
    continued = answer(model, {**inputs, "pixel_values": image}, cache=cache, disable_compile=True)
    at_once = answer(model, {**inputs, "pixel_values": torch.cat([pictures(2), image])})
    assert torch.equal(continued.sequences, at_once.sequences)
    torch.testing.assert_close(torch.stack(continued.logits), torch.stack(at_once.logits), **CLOSE)


def test_a_ragged_batch_answers_as_its_samples_alone(model):
    rows = [sequence(1, "image", 2, "image", 3), sequence(4, 5), sequence("image", 7)]
    together = answer(model, {**left_padded(rows), "pixel_values": pictures(3)}).sequences
    start = 0
    for index, row in enumerate(rows):
        images = pictures(3)[start : (start := start + row.count(START))]
        inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
        alone = answer(model, {**inputs, "pixel_values": images} if len(images) else inputs).sequences
        assert torch.equal(together[index, -6:], alone[0, -6:])


@pytest.mark.parametrize("with_types", [True, False])
def test_beams_of_samples_with_several_images_are_those_of_each_sample_alone(qwen, with_types):
    rows = [sequence(1, "image", 2, "image", 3), sequence(4, "image", 5)]
    inputs = left_padded(rows)
    if with_types:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    beams = {"num_beams": 3, "num_return_sequences": 3}
    together = answer(qwen, {**inputs, "pixel_values": pictures(3)}, **beams).sequences
    for index, images in enumerate((pictures(3)[:2], pictures(3)[2:])):
        row = torch.tensor([rows[index]])
        alone = answer(
            qwen, {"input_ids": row, "attention_mask": torch.ones_like(row), "pixel_values": images}, **beams
        )
        assert torch.equal(together[3 * index : 3 * index + 3, -6:], alone.sequences[:, -6:])


def test_every_one_of_several_answers_sees_its_own_images(qwen):
    greedy = answer(qwen, prompt()).sequences
    several = answer(qwen, prompt(), do_sample=True, top_k=1, num_return_sequences=3).sequences
    assert torch.equal(several, greedy.expand(3, -1))


def test_several_answers_to_embeddings_see_their_own_images(qwen):
    inputs = prompt()
    embeds = qwen.get_input_embeddings()(inputs.pop("input_ids"))
    several = answer(qwen, {**inputs, "inputs_embeds": embeds}, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(several.sequences, answer(qwen, prompt()).sequences[:, -6:].expand(3, -1))


def test_sampling_is_decided_by_the_seed(qwen):
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return answer(qwen, prompt(), do_sample=True, temperature=3.0, max_new_tokens=12).sequences

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_generate_reads_inputs_embeds(qwen):
    inputs = prompt()
    embeds = qwen.get_input_embeddings()(inputs.pop("input_ids"))
    by_embeds = answer(qwen, {**inputs, "inputs_embeds": embeds}).sequences
    assert torch.equal(by_embeds, answer(qwen, prompt()).sequences[:, -6:])


def test_a_streamer_gets_every_new_token(qwen, tiny_tokenizer):
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True)
    expected = tiny_tokenizer.decode(answer(qwen, prompt()).sequences[0, -6:])
    thread = Thread(target=lambda: qwen.generate(**prompt(), max_new_tokens=6, do_sample=False, streamer=streamer))
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_prefill_in_chunks_is_refused(qwen):
    with pytest.raises(ValueError, match="prefill_chunk_size would cut an image"):
        qwen.generate(**prompt(), prefill_chunk_size=4, max_new_tokens=1)
    generation_config = copy.deepcopy(qwen.generation_config)
    generation_config.prefill_chunk_size = 4
    with pytest.raises(ValueError, match="prefill_chunk_size would cut an image"):
        qwen.generate(**prompt(), generation_config=generation_config, max_new_tokens=1)


def test_an_unknown_generation_mode_is_refused(qwen):
    with pytest.raises(ValueError, match="generation_mode='video' must be 'text', 'image' or 'interleaved'"):
        qwen.generate(**prompt(), generation_mode="video")


# Drawing


def prompts() -> dict[str, Tensor]:
    return left_padded([[1, 2, 3, START], [4, START]])


def prefill_pair(model, negative: list[int]) -> tuple[ImagePrefix, ImagePrefix]:
    """Both prompts, and their negative prompts."""
    return model.prefill(**prompts()), model.prefill(**left_padded([negative, negative]))


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_step_from_the_prefix_equals_the_full_pass(text, attn_implementation):
    model = hydra_model(text, 0, attn_implementation)
    prefix = model.prefill(**prompts())
    rows = [[1, 2, 3, START, *[IMAGE] * 5], [4, START, *[IMAGE] * 5]]
    inputs = left_padded(rows)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    latents = gaussian(2, 6, 2, 2)
    for sigma in (torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.2]), torch.tensor([0.1, 0.9])):
        full = model(**inputs, latents=latents, sigma=sigma, is_generated=torch.tensor([True, True])).velocity
        step = model.denoise_step(latents, sigma, [GuidanceBranch(prefix)])
        torch.testing.assert_close(step, full, **CLOSE)
        latents = latents - 0.3 * step


def test_a_step_after_a_given_image_equals_the_full_pass(model):
    row = sequence(1, "image", 2)
    prefix = model.prefill(torch.tensor([[*row, START]]), torch.ones(1, len(row) + 1).long(), pictures(1))
    given = model.encode_images(pictures(1))
    latents, sigma = gaussian(1, 6, 2, 2), torch.tensor([0.8])
    full = model(
        input_ids=torch.tensor([sequence(*row, "image")[:-1]]),
        latents=torch.cat([given, latents]),
        sigma=torch.tensor([0.0, 0.8]),
        is_generated=torch.tensor([False, True]),
    ).velocity
    torch.testing.assert_close(model.denoise_step(latents, sigma, [GuidanceBranch(prefix)]), full, **CLOSE)


def test_denoising_leaves_the_prefix_as_it_is(qwen):
    prefix = qwen.prefill(**prompts())
    keys = [layer.keys.clone() for layer in prefix.cache.layers]
    latents, sigma = gaussian(2, 6, 2, 2), torch.tensor([1.0, 1.0])
    first = qwen.denoise_step(latents, sigma, [GuidanceBranch(prefix)])
    for _ in range(3):
        assert torch.equal(qwen.denoise_step(latents, sigma, [GuidanceBranch(prefix)]), first)
    assert prefix.cache.get_seq_length() == 4
    for layer, before in zip(prefix.cache.layers, keys):
        assert torch.equal(layer.keys, before)


def test_one_prefix_draws_images_of_several_sizes(qwen):
    prefix = qwen.prefill(**prompts())
    sigma = torch.ones(2)
    small, large = gaussian(2, 6, 2, 2), gaussian(2, 6, 3, 2)
    first = qwen.denoise_step(small, sigma, [GuidanceBranch(prefix)])
    assert qwen.denoise_step(large, sigma, [GuidanceBranch(prefix)]).shape == large.shape
    assert torch.equal(qwen.denoise_step(small, sigma, [GuidanceBranch(prefix)]), first)


def test_the_same_number_of_tokens_on_another_grid_is_another_image(qwen):
    prefix = qwen.prefill(**prompts())
    latents = gaussian(2, 6, 2, 3)
    wide, tall = (
        qwen.denoise_step(x, torch.ones(2), [GuidanceBranch(prefix)]).flatten(2)
        for x in (latents, latents.reshape(2, 6, 3, 2))
    )
    assert not torch.allclose(wide, tall)


def test_guidance_mixes_the_two_branches(qwen):
    negative = [5, 6, START]
    latents, sigma = gaussian(2, 6, 2, 2), torch.tensor([0.7, 0.4])
    guided = qwen.denoise_step(latents, sigma, classifier_free(*prefill_pair(qwen, negative), 3.0))
    conditional = qwen.denoise_step(latents, sigma, [GuidanceBranch(qwen.prefill(**prompts()))])
    unconditional = qwen.denoise_step(
        latents, sigma, [GuidanceBranch(qwen.prefill(**left_padded([negative, negative])))]
    )
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), atol=1e-4, rtol=1e-4)


def test_guidance_of_1_is_the_prompt_alone(qwen):
    latents, sigma = gaussian(2, 6, 2, 2), torch.tensor([0.7, 0.4])
    guided = qwen.denoise_step(latents, sigma, classifier_free(*prefill_pair(qwen, [5, START]), 1.0))
    torch.testing.assert_close(
        guided, qwen.denoise_step(latents, sigma, [GuidanceBranch(qwen.prefill(**prompts()))]), **CLOSE
    )


def test_a_batch_denoises_as_its_samples_alone(model):
    latents, sigma = gaussian(2, 6, 2, 2), torch.tensor([0.7, 0.4])
    scale = torch.tensor([2.0, 5.0])[:, None, None, None]
    together = model.denoise_step(latents, sigma, classifier_free(*prefill_pair(model, [5, 6, 7, START]), scale))
    for index, row in enumerate([[1, 2, 3, START], [4, START]]):
        one = slice(index, index + 1)
        prefixes = [model.prefill(**left_padded([prompt])) for prompt in (row, [5, 6, 7, START])]
        alone = model.denoise_step(latents[one], sigma[one], classifier_free(*prefixes, scale[one]))
        torch.testing.assert_close(together[one], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_guided_step_of_ragged_branches_equals_full_passes(text, attn_implementation):
    """The reference reads both branches as one batch, every row padded to the longest prompt."""
    model = hydra_model(text, 0, attn_implementation)
    branches = [[1, 2, 3, 7, 8, 9, START], [4, START]], [[5, 6, START], [START]]
    latents, sigma, scale = gaussian(2, 6, 2, 2), torch.tensor([0.7, 0.4]), 3.0
    inputs = left_padded([row + [IMAGE] * 5 for branch in branches for row in branch])
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    full = model(
        **inputs, latents=latents.repeat(2, 1, 1, 1), sigma=sigma.repeat(2), is_generated=torch.ones(4).bool()
    ).velocity
    conditional, unconditional = full.chunk(2)
    prefixes = [model.prefill(**left_padded(branch)) for branch in branches]
    guided = model.denoise_step(latents, sigma, classifier_free(*prefixes, scale))
    torch.testing.assert_close(guided, unconditional + scale * (conditional - unconditional), **CLOSE)


def test_each_branch_reads_its_own_prompts_and_no_padding_of_the_other():
    model, num_keys = hydra_model(), []
    prefixes = [model.prefill(**left_padded([row])) for row in ([1] * 99 + [START], [START])]
    model.model.language_model.layers[0].self_attn.register_forward_hook(
        lambda module, args, kwargs, output: num_keys.append(kwargs["attention_mask"].shape[-1]), with_kwargs=True
    )
    model.denoise_step(gaussian(1, 6, 2, 2), torch.ones(1), classifier_free(*prefixes, 3.0))
    assert [prefix.cache.get_seq_length() for prefix in prefixes] == [100, 1]
    assert num_keys == [1 + 5, 100 + 5]  # the negative prompt first


@pytest.mark.parametrize("lengths", [(2,), (3, 2), (2, 3), (6,)])
def test_a_prefix_of_another_number_of_rows_is_refused(qwen, lengths):
    prefixes = [qwen.prefill(**left_padded([[1, START]] * number)) for number in lengths]
    wrong = next(number for number in lengths if number != 3)
    with pytest.raises(ValueError, match=f"prefix of {wrong} rows does not fit latents of 3 images"):
        qwen.denoise_step(gaussian(3, 6, 2, 2), torch.ones(3), [GuidanceBranch(prefix) for prefix in prefixes])


def test_a_prompt_that_does_not_open_an_image_is_refused(qwen):
    with pytest.raises(
        ValueError, match=rf"end with vision_start_token_id={START}; the last tokens are \[{START}, 3\]"
    ):
        qwen.prefill(torch.tensor([[1, START], [START, 3]]), torch.ones(2, 2).long())


def test_a_frozen_prefix_answers_without_remembering():
    cache = DynamicCache()
    states = gaussian(3, 2, 4, 8)
    cache.update(states, states, 0)
    frozen = FrozenPrefixCache.from_cache(cache)
    new = gaussian(3, 2, 2, 8, seed=1)
    for _ in range(2):
        keys, values = frozen.update(new, -new, 0)
        assert torch.equal(keys, torch.cat([states, new], -2))
        assert torch.equal(values, torch.cat([states, -new], -2))
        assert frozen.get_seq_length() == 4
    assert frozen.layers[0].keys is cache.layers[0].keys  # shared, not copied
    assert torch.equal(frozen.layers[0].keys, states)


def test_a_language_model_that_forgets_is_refused():
    text_config = hydra_config().text_config.to_dict()
    text_config |= {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    model = hydra_model(text_config=AutoConfig.for_model(**text_config))
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer cannot be frozen"):
        model.prefill(**prompts())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_generate_draws_what_the_generator_decides(model, guidance_scale):
    def draw(seed: int, **kwargs) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        inputs = left_padded([[1, 2, 3], [4]])
        return model.generate(
            **inputs, generation_mode="image", num_inference_steps=2, guidance_scale=guidance_scale,
            generator=generator, **kwargs,
        )  # fmt: skip

    images = draw(0)
    assert images.shape == (2, 3, 12, 12)
    assert torch.isfinite(images).all()
    assert torch.equal(images, draw(0))
    assert not torch.equal(images, draw(1))
    assert draw(0, height=8, width=20).shape == (2, 3, 8, 20)


class PerfectModel(HydraForConditionalGeneration):
    """Knows what to draw, so that its velocity is the true one: what remains is the sampler."""

    def denoise_step(self, latents, sigma, branches, *, image_grid_thw):
        return (latents - latents_to_tokens(self.target)[0]) / sigma


@pytest.mark.parametrize("num_steps", [1, 5])
def test_a_perfect_velocity_draws_the_data(num_steps):
    decoder = PixelViTDecoderConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=PATCH
    )
    model = PerfectModel(hydra_config(vision_config=tok_config(decoder_config=decoder))).eval()
    model.target = model.encode_images(pictures(1, 12, 12))
    images = model.generate(torch.tensor([[1, 2]]), generation_mode="image", num_inference_steps=num_steps)
    torch.testing.assert_close(images, model.decode_latents(model.target), **CLOSE)


def test_an_open_image_is_not_opened_twice(qwen):
    def draw(row):
        generator = torch.Generator().manual_seed(0)
        return qwen.generate(torch.tensor([row]), generation_mode="image", num_inference_steps=1, generator=generator)

    assert torch.equal(draw([1, 2]), draw([1, 2, START]))


def test_an_image_is_edited_without_guidance(qwen):
    row = sequence(1, "image", 2)
    kwargs = {
        "input_ids": torch.tensor([row]),
        "pixel_values": pictures(1),
        "mm_token_type_ids": torch.tensor([row]) == IMAGE,
        "generation_mode": "image",
        "num_inference_steps": 1,
    }
    assert qwen.generate(**kwargs, guidance_scale=1).shape == (1, 3, 12, 12)
    with pytest.raises(ValueError, match="guidance_scale=4.5 for prompts with images, expected 1"):
        qwen.generate(**kwargs)


@pytest.mark.parametrize(("height", "width"), [(13, 12), (12, -4), (12, 2)])
def test_a_size_off_the_patch_grid_is_refused(qwen, height, width):
    with pytest.raises(ValueError, match=f"height={height} and width={width}"):
        qwen.generate(torch.tensor([[1]]), generation_mode="image", height=height, width=width)


def test_a_size_of_0_is_refused(qwen):
    with pytest.raises(ValueError, match="height=0"):
        qwen.get_latent_grid(0, 12)


def test_the_shift_follows_the_size_of_the_latents_unless_the_config_says_it():
    assert hydra_model().get_sigma_shift(9) == 3.0  # the least
    with torch.device("meta"):
        big = HydraForConditionalGeneration(HydraConfig.hydra_1_5b())
    assert big.get_sigma_shift(1024) == 4.0
    assert hydra_model(sigma_shift=2).get_sigma_shift(9) == 2.0


# Weights


def test_the_language_head_is_tied_to_the_embeddings(tmp_path):
    model = hydra_model()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    reloaded = HydraForConditionalGeneration.from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.get_input_embeddings().weight


def test_an_untied_language_head_stays_untied(tmp_path):
    text_config = hydra_config().text_config
    text_config.tie_word_embeddings = False
    model = hydra_model(text_config=text_config)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    reloaded = HydraForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_weights(reloaded, model)
    assert not torch.equal(reloaded.lm_head.weight, reloaded.get_input_embeddings().weight)


def test_resized_embeddings_keep_the_head_tied():
    model = hydra_model()
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.text_config.vocab_size == model.lm_head.out_features == 70
    batch = training_batch()
    assert torch.isfinite(model(**batch).loss)


def test_a_fresh_vision_head_predicts_zero_also_after_saving(tmp_path):
    fresh = HydraForConditionalGeneration(hydra_config()).eval()
    fresh.save_pretrained(tmp_path)
    batch = training_batch()
    for model in (fresh, HydraForConditionalGeneration.from_pretrained(tmp_path)):
        zeros = [module for module in model.vision_head.modules() if isinstance(module, ZeroLinear)]
        assert len(zeros) == 4
        assert not model(**batch).velocity.any()


def test_a_vision_head_that_a_checkpoint_lacks_starts_at_zero(tmp_path):
    hydra_model().model.save_pretrained(tmp_path)
    blocks = [torch.full((size,), -4e19) for size in (16, 96, 512, 1536) for _ in range(100)]
    del blocks
    model, _ = HydraForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not model(**training_batch()).velocity.any()
    assert_same_weights(model.model, hydra_model().model)


@pytest.mark.parametrize("cls", [HydraForConditionalGeneration, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_a_saved_model_opens_with_equal_weights_and_outputs(model, tmp_path, cls):
    statistics = gaussian(6, seed=8).exp()
    model = copy.deepcopy(model)
    model.model.vision_tower.set_latents_statistics(gaussian(6, seed=7), statistics)
    model.save_pretrained(tmp_path)
    reloaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert type(reloaded) is HydraForConditionalGeneration
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_weights(reloaded, model)
    batch = training_batch()
    a, b = model(**batch), reloaded(**batch)
    # not the bits: a product's rounding depends on where the weights lie in memory
    torch.testing.assert_close(a.logits, b.logits, **CLOSE)
    torch.testing.assert_close(a.velocity, b.velocity, **CLOSE)


def test_auto_model_opens_the_base_model(tmp_path):
    model = hydra_model()
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(reloaded) is HydraModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_weights(reloaded, model.model)


def test_bf16_weights_answer_draw_and_train(tmp_path):
    hydra_model().save_pretrained(tmp_path)
    model = HydraForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    full = HydraForConditionalGeneration.from_pretrained(tmp_path)
    batch = training_batch()
    output, expected = model(**batch), full(**batch)
    assert output.velocity.dtype == torch.float32
    assert (output.velocity - expected.velocity).abs().mean() < 0.1 * expected.velocity.std()
    assert (output.logits.float() - expected.logits).abs().mean() < 0.1 * expected.logits.std()
    output.loss.backward()
    assert torch.isfinite(model.vision_head.out_proj.weight.grad).all()
    assert answer(model, prompt()).sequences.shape[1] == prompt()["input_ids"].shape[1] + 6
    images = model.generate(torch.tensor([[1, 2]]), generation_mode="image", num_inference_steps=2)
    assert torch.isfinite(images).all()


def test_training_under_bf16_autocast_keeps_the_velocity_in_fp32():
    model = hydra_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**training_batch())
    assert output.velocity.dtype == output.flow_loss.dtype == torch.float32
    output.loss.backward()
    assert torch.isfinite(model.vision_head.out_proj.weight.grad).all()


LORA_TARGETS = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"


def test_lora_on_the_language_model_trains_it_alone_and_merges(tmp_path):
    base = hydra_model()
    keys, before = set(base.state_dict()), base(**training_batch())
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False))
    trained = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of seven projections in two layers
    assert all(".language_model." in name for name in trained)
    lora(**training_batch()).loss.backward()
    assert all(parameter.grad is not None for name, parameter in lora.named_parameters() if name in trained)
    adapted = lora.eval()(**training_batch())
    assert not torch.allclose(adapted.logits, before.logits)
    merged = lora.merge_and_unload()
    assert type(merged) is HydraForConditionalGeneration
    assert set(merged.state_dict()) == keys
    after = merged(**training_batch())
    torch.testing.assert_close(after.logits, adapted.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.velocity, adapted.velocity, atol=1e-4, rtol=1e-4)


# Configurations


def test_a_config_survives_saving(tmp_path):
    config = hydra_config("qwen3", llm_visual_input="latent", use_time_token=False, sigma_shift=2)
    config.save_pretrained(tmp_path)
    reloaded = HydraConfig.from_pretrained(tmp_path)
    assert {**reloaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert type(reloaded.text_config) is type(config.text_config)
    vision_config = HydraTokConfig.from_pretrained(tmp_path)
    assert vision_config.to_diff_dict() == config.vision_config.to_diff_dict() | {
        key: value for key, value in vision_config.to_diff_dict().items() if key == "_name_or_path"
    }


PRESETS = {
    "hydra_1_5b": (
        {
            "model.vision_tower": 448_666_316,
            "model.multi_modal_projector": 1_576_448,
            "model.time_embedding": 2_755_584,
            "model.language_model": 1_543_714_304,
            "vision_head": 180_001_856,
        },
        2_176_714_508,
    ),
    "hydra_7b": (
        {
            "model.vision_tower": 448_666_316,
            "model.multi_modal_projector": 3_675_648,
            "model.time_embedding": 13_769_728,
            "model.language_model": 7_070_619_136,
            "vision_head": 183_151_680,
            "lm_head": 544_997_376,
        },
        8_264_879_884,
    ),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_number_of_parameters_that_the_readme_says(preset):
    parts, total = PRESETS[preset]
    with torch.device("meta"):
        model = HydraForConditionalGeneration(getattr(HydraConfig, preset)())
    for name, expected in parts.items():
        assert sum(parameter.numel() for parameter in model.get_submodule(name).parameters()) == expected, name
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(parts.values()) == total


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_being_a_dictionary(preset):
    config = getattr(HydraConfig, preset)("L", use_time_token=False)
    assert config.vision_config.decoder_config.num_global_layers == 18
    assert HydraConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm_visual_input": "pixels"}, "must be 'semantic' or 'latent'"),
        ({"image_token_id": 64}, "image_token_id=64 is outside self.text_config.vocab_size=64"),
        ({"vision_start_token_id": -1}, "vision_start_token_id=-1 is outside"),
        ({"vision_head_config": {"hidden_size": 20, "num_attention_heads": 2}}, "multiple of 4 x 2 heads"),
        ({"sigma_shift": "large"}, "sigma_shift"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(Exception, match=message):
        hydra_config(**changes)
