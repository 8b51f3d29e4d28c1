"""Images of several sizes in one batch: whatever is computed is what each sample gives alone."""

import pytest
import torch
from tiny import IMAGE, PATCH, START, gaussian, hydra_model, left_padded, pictures, sequence, tok_model
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hydra_hf import HydraForConditionalGeneration
from hydra_hf.modeling.flow import add_noise, velocity_target
from hydra_hf.modeling.grid import (
    latents_to_tokens,
    num_tokens,
    pack_images,
    pack_latents,
    per_token,
    tokens_to_latents,
)
from hydra_hf.modeling.image_generation import GuidanceBranch, classifier_free


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
GRIDS = [(1, 2, 2), (1, 1, 3), (1, 3, 2), (1, 2, 2)]
ROWS = [(0, 1), (2,), (3,)]  # which images each of three prompts has


@pytest.fixture(scope="module", params=["semantic", "latent"])
def model(request) -> HydraForConditionalGeneration:
    return hydra_model(llm_visual_input=request.param)


@pytest.fixture(scope="module")
def qwen() -> HydraForConditionalGeneration:
    return hydra_model()


def images(*indices: int) -> list[Tensor]:
    return [pictures(1, GRIDS[i][1] * PATCH, GRIDS[i][2] * PATCH, seed=i)[0] for i in indices]


def packed(*indices: int) -> dict[str, Tensor]:
    pixel_values, image_grid_thw = pack_images(images(*indices), PATCH)
    return {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}


def prompt(*indices: int, end: tuple[int, ...] = ()) -> list[int]:
    row = [1]
    for index in indices:
        row += [*sequence("image", num_tokens=1 + num_tokens(GRIDS[index])), 2 + index]
    return row + list(end)


def batch_of(*rows: tuple[int, ...]) -> dict[str, Tensor]:
    """Prompts and noised images of samples, with all their targets; every second image is generated."""
    inputs = left_padded([prompt(*row) for row in rows])
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= IMAGE, -100)
    labels[labels == 1] = -100  # nothing precedes the first token of a row unless it is padded
    indices = [index for row in rows for index in row]
    grids = [GRIDS[index] for index in indices]
    tokens = torch.cat([gaussian(num_tokens(GRIDS[i]), 6, seed=i) for i in indices])
    noise = torch.cat([gaussian(num_tokens(GRIDS[i]), 6, seed=10 + i) for i in indices])
    sigma = torch.tensor([0.1 + 0.2 * i for i in indices])
    is_generated = torch.tensor([i % 2 == 0 for i in indices])
    targets = velocity_target(tokens, noise)[per_token(is_generated, grids)]
    return {
        **inputs, "labels": labels.masked_fill(inputs["attention_mask"] == 0, -100),
        "latents": add_noise(tokens, noise, per_token(sigma, grids)), "sigma": sigma,
        "image_grid_thw": torch.tensor(grids), "is_generated": is_generated, "velocity_target": targets,
    }  # fmt: skip


def alone(row: tuple[int, ...]) -> dict[str, Tensor]:
    batch = batch_of(row)
    if not batch["is_generated"].any():
        del batch["is_generated"], batch["velocity_target"]
    return batch


# Forward and losses


def test_states_and_velocities_are_those_of_each_sample_alone(model):
    together = model(**{name: value for name, value in batch_of(*ROWS).items() if name != "labels"})
    mask, velocities = batch_of(*ROWS)["attention_mask"].bool(), []
    for index, row in enumerate(ROWS):
        one = model(**{name: value for name, value in alone(row).items() if name != "labels"})
        torch.testing.assert_close(together.logits[index][mask[index]], one.logits[0], **CLOSE)
        velocities += [] if one.velocity is None else [one.velocity]
    torch.testing.assert_close(together.velocity, torch.cat(velocities), **CLOSE)


def test_losses_are_means_over_the_tokens_of_all_samples(model):
    together, sums, counts = model(**batch_of(*ROWS)), [0, 0], [0, 0]
    for row in ROWS:
        batch = alone(row)
        one = model(**batch)
        for kind, (loss, count) in enumerate([
            (one.language_loss, (batch["labels"][:, 1:] != -100).sum()),
            (one.flow_loss, len(batch.get("velocity_target", ()))),
        ]):  # fmt: skip
            sums[kind] += 0 if loss is None else loss * count
            counts[kind] += count
    torch.testing.assert_close(together.language_loss, sums[0] / counts[0], **CLOSE)
    torch.testing.assert_close(together.flow_loss, sums[1] / counts[1], **CLOSE)
    torch.testing.assert_close(together.loss, together.language_loss + together.flow_loss)


def test_gradients_are_those_of_each_sample_alone():
    gradients = []
    for batches in ([batch_of(*ROWS)], [alone(row) for row in ROWS]):
        model = hydra_model().train()
        for batch in batches:
            output = model(**batch)
            loss = output.language_loss * (batch["labels"][:, 1:] != -100).sum()
            if output.flow_loss is not None:
                loss = loss + output.flow_loss * len(batch["velocity_target"])
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, atol=1e-4, rtol=1e-4)


def test_packed_images_of_one_size_are_read_as_dense_ones(model):
    input_ids = torch.tensor([prompt(0, 3)])
    dense = torch.stack(images(0, 3))
    by_dense = model(input_ids=input_ids, pixel_values=dense)
    torch.testing.assert_close(model(input_ids=input_ids, **packed(0, 3)).logits, by_dense.logits, **CLOSE)
    latents, sigma, marks = model.encode_images(dense), torch.tensor([0.3, 0.6]), torch.tensor([True, True])
    tokens, grids = pack_latents(latents, None)
    torch.testing.assert_close(model.encode_images(**packed(0, 3)), tokens, **CLOSE)
    by_dense = model(input_ids=input_ids, latents=latents, sigma=sigma, is_generated=marks).velocity
    by_packed = model(
        input_ids=input_ids, latents=tokens, image_grid_thw=torch.tensor(grids), sigma=sigma, is_generated=marks
    ).velocity
    assert torch.equal(by_packed, latents_to_tokens(by_dense).flatten(0, 1))


def test_the_vision_head_sees_its_own_image_alone(qwen):
    grids = GRIDS[:3]
    total = sum(map(num_tokens, grids))
    states, noisy, sigma = gaussian(total, 32), gaussian(total, 6, seed=1), torch.tensor([0.2, 0.5, 0.9])
    changed = states.clone()
    changed[4:7] *= -1  # the second image
    before, after = (qwen._predict_velocity(x, noisy, sigma, grids) for x in (states, changed))
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[7:], after[7:])
    assert (before[4:7] - after[4:7]).abs().amax(-1).min() > 1e-3


def test_latents_of_given_images_are_those_of_each_alone(qwen):
    indices = (1, 0, 2, 3)
    together = qwen.encode_images(**packed(*indices))
    each = [latents_to_tokens(qwen.encode_images(image[None]))[0] for image in images(*indices)]
    torch.testing.assert_close(together, torch.cat(each), **CLOSE)


def test_features_are_one_tensor_for_each_image(qwen):
    outputs = qwen.get_image_features(**packed(0, 1, 2))
    features, states = outputs.pooler_output, outputs.last_hidden_state.split([4, 3, 6])
    assert [tuple(image.shape) for image in features] == [(5, 32), (4, 32), (7, 32)]
    for image, feature, state in zip(images(0, 1, 2), features, states):
        alone = qwen.get_image_features(image[None])
        torch.testing.assert_close(feature, alone.pooler_output[0], **CLOSE)
        torch.testing.assert_close(state, alone.last_hidden_state[0], **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_thw": None}, r"\(7, 48\) of .* must be floats \(B, 3, H, W\)"),
        ({"image_grid_thw": torch.tensor([[1, 2, 2]])}, r"pixel_values \(7, 48\) must be packed, \(4, ...\)"),
        ({"pixel_values": pictures(2)}, r"pixel_values \(2, 3, 8, 8\) must be packed"),
        ({"pixel_values": 100 * torch.ones(7, 48)}, r"expected pixels in \[-1, 1\]"),
    ],
)
def test_packed_pixels_that_do_not_fit_their_grids_are_refused(qwen, changes, message):
    with pytest.raises(ValueError, match=message):
        qwen(input_ids=torch.tensor([prompt(0, 1)]), **{**packed(0, 1), **changes})


def test_images_in_another_order_than_their_placeholders_are_refused(qwen):
    with pytest.raises(ValueError, match=r"runs of \[5, 4\] image placeholders.*need runs of \[4, 5\]"):
        qwen(input_ids=torch.tensor([prompt(0, 1)]), **packed(1, 0))


def test_packed_latents_that_do_not_fit_their_grids_are_refused(qwen):
    batch = batch_of((0, 1))
    with pytest.raises(ValueError, match=r"latents \(7, 6\) must be packed, \(8, ...\)"):
        qwen(**{**batch, "image_grid_thw": torch.tensor([(1, 2, 2), (1, 2, 2)])})
    with pytest.raises(ValueError, match="or packed with image_grid_thw"):
        qwen(**{**batch, "image_grid_thw": None})


# The language head


def test_the_language_head_runs_at_labelled_positions_alone(qwen):
    batch, shapes = batch_of(*ROWS), []
    hook = qwen.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    output = qwen(**batch)
    hook.remove()
    is_labelled = batch["labels"][:, 1:] != -100
    assert shapes == [(int(is_labelled.sum()), 64)] == [tuple(output.logits.shape)]
    every = qwen(**{name: value for name, value in batch.items() if name != "labels"}).logits
    torch.testing.assert_close(output.logits, every[:, :-1][is_labelled], atol=1e-6, rtol=1e-5)
    expected = nn.functional.cross_entropy(every[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.language_loss, expected, atol=1e-6, rtol=1e-6)


# Answers


def answers(model, rows: list[tuple[int, ...]], **kwargs) -> Tensor:
    inputs = left_padded([prompt(*row, end=(7,)) for row in rows])
    inputs |= packed(*[index for row in rows for index in row])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    options = {"max_new_tokens": 6, "do_sample": False, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
def test_answers_are_those_of_each_sample_alone(qwen, options):
    together = answers(qwen, ROWS, **options)
    assert torch.equal(together, torch.cat([answers(qwen, [row], **options) for row in ROWS]))


def test_a_prompt_with_two_pictures_of_two_sizes_sees_both(qwen):
    input_ids = torch.tensor([prompt(0, 1)])
    before, changed = qwen(input_ids=input_ids, **packed(0, 1)).logits[0, -1], packed(0, 1)
    for patch in (0, 5):  # one of each picture
        other = {**changed, "pixel_values": changed["pixel_values"].clone()}
        other["pixel_values"][patch] *= -1
        assert (qwen(input_ids=input_ids, **other).logits[0, -1] - before).abs().max() > 1e-4


# Drawing


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_step_of_images_of_several_sizes_is_that_of_each_alone(model, guidance_scale):
    prompts, grids = [[1, 2, 3, START], [4, START], [5, 6, START]], GRIDS[:3]
    latents = [gaussian(1, 6, *grid[1:], seed=index) for index, grid in enumerate(grids)]
    sigma = torch.tensor([0.3, 0.6, 0.9])

    def step(rows: list[list[int]], latents: Tensor, sigma: Tensor, **kwargs) -> Tensor:
        prefix = model.prefill(**left_padded(rows))
        if guidance_scale == 1:
            branches = [GuidanceBranch(prefix)]
        else:
            negative_prefix = model.prefill(**left_padded([[9, START]] * len(rows)))
            branches = classifier_free(prefix, negative_prefix, guidance_scale)
        return model.denoise_step(latents, sigma, branches, 0.5, **kwargs)

    tokens = torch.cat([latents_to_tokens(image)[0] for image in latents])
    together = step(prompts, tokens, sigma, image_grid_thw=torch.tensor(grids))
    parts = together.split([num_tokens(grid) for grid in grids])
    for index, grid in enumerate(grids):
        one = slice(index, index + 1)
        expected = step(prompts[one], latents[index], sigma[one])
        torch.testing.assert_close(tokens_to_latents(parts[index][None], grid), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_of_several_sizes_are_drawn_as_each_alone(qwen, guidance_scale):
    prompts, heights, widths = [[1, 2, 3], [4], [5, 6]], [8, 4, 8], [8, 12, 8]

    def draw(indices: list[int]) -> list[Tensor]:
        return list(qwen.generate(
            **left_padded([prompts[i] for i in indices]), generation_mode="image", num_inference_steps=3,
            guidance_scale=guidance_scale, height=[heights[i] for i in indices], width=[widths[i] for i in indices],
            generator=[torch.Generator().manual_seed(i) for i in indices],
        ))  # fmt: skip

    together = draw([0, 1, 2])
    assert [tuple(image.shape) for image in together] == [(3, 8, 8), (3, 4, 12), (3, 8, 8)]
    for index, image in enumerate(together):
        torch.testing.assert_close(image, draw([index])[0], atol=1e-4, rtol=1e-4)


def test_sizes_that_are_not_as_many_as_the_prompts_are_refused(qwen):
    with pytest.raises(ValueError, match=r"height=\[8, 8\].*for 3 prompts"):
        qwen.generate(torch.tensor([[1]] * 3), generation_mode="image", height=[8, 8])


def test_the_prompt_that_leaves_its_picture_no_room_is_named(qwen):
    context = qwen.config.text_config.max_position_embeddings
    side = PATCH * int(context**0.5)
    num_image_tokens = 1 + (side // PATCH) ** 2
    sizes = {"height": [PATCH, side], "width": [PATCH, side]}
    rows = left_padded([[1, 2, 3], [1] * (context - num_image_tokens)])  # one token more with <|vision_start|>
    with pytest.raises(
        ValueError,
        match=f"Prompt 1 has {context - num_image_tokens + 1} tokens and its image {num_image_tokens}, expected at most {context}",
    ):
        qwen.generate(**rows, generation_mode="image", **sizes)


def test_a_picture_is_drawn_after_two_pictures_of_two_sizes(qwen):
    drawn = qwen.generate(
        torch.tensor([prompt(0, 1)]), **packed(0, 1), generation_mode="image", num_inference_steps=1, guidance_scale=1
    )
    assert drawn.shape == (1, 3, 12, 12)


# Flash attention reads all images as one row


def attention_in_segments(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs):
    """What flash kernels compute, written out: attention inside each segment of a row that `cu_seq_lens_q` names."""
    assert attention_mask is None
    bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    assert bounds[-1] == query.shape[2]
    parts = [
        nn.functional.scaled_dot_product_attention(*[x[:, :, start:end] for x in (query, key, value)], scale=scaling)
        for start, end in zip(bounds[:-1], bounds[1:])
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch) -> HydraForConditionalGeneration:
    """A model whose image networks have an attention that takes rows of several images, as flash kernels do."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_segments", attention_in_segments)
    model = hydra_model()
    for config in (model.model.vision_tower.config, model.config.vision_head_config,
                   model.model.vision_tower.config.decoder_config):  # fmt: skip
        config._attn_implementation = "flash_segments"
    return model


def test_a_row_of_all_images_gives_what_groups_of_equal_grids_give(flash):
    plain, lengths = hydra_model(), []
    flash.model.vision_tower.sem_vit.layers[0].register_forward_hook(
        lambda module, args, output: lengths.append(tuple(output.shape[:2]))
    )
    batch = batch_of(*ROWS)
    ours, theirs = flash(**batch), plain(**batch)
    assert lengths == [(1, sum(map(num_tokens, GRIDS)))]
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    torch.testing.assert_close(ours.velocity, theirs.velocity, **CLOSE)
    pixels = packed(0, 1, 2)
    torch.testing.assert_close(flash.encode_images(**pixels), plain.encode_images(**pixels), **CLOSE)
    tokens, grids = torch.cat([gaussian(num_tokens(grid), 6) for grid in GRIDS[:3]]), torch.tensor(GRIDS[:3])
    generators = [[torch.Generator().manual_seed(i) for i in range(3)] for _ in range(2)]
    decoded = [each.decode_latents(tokens, grids, generator=g) for each, g in zip((flash, plain), generators)]
    for ours, theirs in zip(*decoded, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_tokenizer_without_a_class_token_reads_rows_too(flash):
    plain, rows = tok_model(use_cls_token=False), tok_model(use_cls_token=False)
    rows.config._attn_implementation = "flash_segments"
    patches, grids = packed(0, 1, 2)["pixel_values"][None], GRIDS[:3]
    expected = [plain.encode_rows(part, [grid]) for part, grid in zip(patches.split([4, 3, 6], dim=1), grids)]
    torch.testing.assert_close(rows.encode_rows(patches, grids), torch.cat(expected, dim=1), **CLOSE)
