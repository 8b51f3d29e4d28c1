"""Edits: in Sem-ViT the target sees its sources and the sources see nothing of it. HYDRA-X, section 3."""

import pytest
import torch
from tiny import PATCH, START, clip_hydra_model, gaussian, hydra_model, left_padded, pictures, sequence

from hydra_hf.modeling.grid import latents_to_tokens
from hydra_hf.modeling.image_generation import GuidanceBranch, image_and_text
from hydra_hf.modeling.source_interaction import group_targets


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
GRID = (1, 2, 2)


@pytest.fixture(scope="module")
def model():
    return clip_hydra_model()


def embeds(model, *latents, sources=None, sigma=None):
    """Embeddings (N, D) of 2x2 images with time tokens, one by one."""
    tokens = torch.cat([latents_to_tokens(each[None])[0] for each in latents])
    sigma = torch.zeros(len(latents)) if sigma is None else sigma
    packed = model.model.get_image_embeds(tokens, sigma, [GRID] * len(latents), sources)
    return packed.unflatten(0, (len(latents), -1))


def test_a_pair_is_a_clip_of_two_latent_frames(model):
    """As in the paper: Sem-ViT reads [z_c; z_t] with tubelet attention."""
    pair = gaussian(2, 6, 2, 2)
    tower, tokens = model.model.vision_tower, latents_to_tokens(pair)
    states = tower.get_bottleneck_states(tokens.flatten(0, 1)[None])
    expected = tower.sem_vit(states, [(2, 2, 2)])[0]
    interacting = model.model._interacting_states(tokens.flatten(0, 1), [GRID, GRID], [0, 1])
    torch.testing.assert_close(interacting, expected, **CLOSE)


def test_the_source_is_what_it_is_alone_and_the_target_is_not(model):
    source, target = gaussian(2, 6, 2, 2)
    alone, together = embeds(model, source, target), embeds(model, source, target, sources=[0, 1])
    torch.testing.assert_close(together[0], alone[0], **CLOSE)
    assert not torch.allclose(together[1], alone[1], atol=1e-3)


def test_the_target_sees_the_source_and_the_source_not_the_target(model):
    source, target, other = gaussian(3, 6, 2, 2)
    base = embeds(model, source, target, sources=[0, 1])
    assert not torch.allclose(embeds(model, other, target, sources=[0, 1])[1], base[1], atol=1e-3)
    torch.testing.assert_close(embeds(model, source, other, sources=[0, 1])[0], base[0], atol=0, rtol=0)


def test_edits_in_a_batch_with_other_images_are_those_alone(model):
    first, second = gaussian(2, 6, 2, 2), gaussian(2, 6, 2, 2, seed=1)
    image = gaussian(6, 2, 2, seed=2)
    together = embeds(model, *first, image, *second, sources=[0, 1, 0, 0, 1])
    torch.testing.assert_close(together[:2], embeds(model, *first, sources=[0, 1]), **CLOSE)
    torch.testing.assert_close(together[2:3], embeds(model, image), **CLOSE)
    torch.testing.assert_close(together[3:], embeds(model, *second, sources=[0, 1]), **CLOSE)


def test_a_target_sees_all_of_several_sources(model):
    one, two, target, other = gaussian(4, 6, 2, 2)
    base = embeds(model, one, two, target, sources=[0, 0, 2])[2]
    assert not torch.allclose(embeds(model, other, two, target, sources=[0, 0, 2])[2], base, atol=1e-3)
    assert not torch.allclose(embeds(model, one, other, target, sources=[0, 0, 2])[2], base, atol=1e-3)


def test_sources_get_a_gradient_from_the_target(model):
    source, target = gaussian(2, 6, 2, 2)
    source.requires_grad_(True)
    embeds(model, source, target, sources=[0, 1])[1].sum().backward()
    assert source.grad.abs().max() > 0


def test_a_step_of_an_edit_is_the_training_forward_with_its_source(model):
    pixels, latents, sigma = pictures(1), gaussian(1, 6, 2, 2), torch.tensor([0.4])
    prompt = [1, *sequence("image"), 5]
    prefix = model.prefill(**left_padded([[*prompt, START]]), pixel_values=pixels, source_interaction=True)
    step = model.denoise_step(latents, sigma, [GuidanceBranch(prefix)])
    source = model.encode_images(pixels)
    forward = model(
        **left_padded([[*prompt, *sequence("image")]]), latents=torch.cat([source, latents]), sigma=torch.tensor([0, 0.4]),
        num_sources=torch.tensor([0, 1]), is_generated=torch.tensor([False, True]),
    )  # fmt: skip
    torch.testing.assert_close(step, forward.velocity, **CLOSE)
    without = model.prefill(**left_padded([[*prompt, START]]), pixel_values=pixels)
    assert not torch.allclose(model.denoise_step(latents, sigma, [GuidanceBranch(without)]), step, atol=1e-3)


def test_sources_run_through_the_tower_once_for_all_steps(model, monkeypatch):
    counts, forward = [], type(model.model.vision_tower.gen_vit).forward
    monkeypatch.setattr(
        type(model.model.vision_tower.gen_vit), "forward", lambda *a, **k: counts.append(1) or forward(*a, **k)
    )
    ids = left_padded([[1, *sequence("image"), 5, START]])
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "source_interaction": True}
    model.generate_images(**ids, pixel_values=pictures(1), height=8, width=8, **options)
    assert len(counts) == 1


def test_the_branches_of_an_edit_go_from_nothing_to_the_source_to_the_instruction(model):
    pixels, latents, sigma = pictures(1), gaussian(1, 6, 2, 2), torch.tensor([0.4])
    image = sequence("image")
    full = model.prefill(**left_padded([[1, *image, 5, START]]), pixel_values=pixels, source_interaction=True)
    source = model.prefill(**left_padded([[1, *image, START]]), pixel_values=pixels, source_interaction=True)
    null = model.prefill(**left_padded([[1, 2, START]]))
    parts = [model.denoise_step(latents, sigma, [GuidanceBranch(prefix)]) for prefix in (null, source, full)]
    guided = model.denoise_step(latents, sigma, image_and_text(full, source, null, 1.5, 3.0))
    torch.testing.assert_close(
        guided, parts[0] + 1.5 * (parts[1] - parts[0]) + 3.0 * (parts[2] - parts[1]), atol=1e-4, rtol=1e-4
    )


def test_rows_are_repeated_with_their_sources(model):
    pixels, latents = pictures(2), gaussian(1, 6, 2, 2).repeat(4, 1, 1, 1)
    ids = left_padded([[1, *sequence("image"), 5, START]] * 2)
    prefix = model.prefill(**ids, pixel_values=pixels, source_interaction=True)
    sigma = torch.full((4,), 0.4)
    single = model.denoise_step(latents[:2], sigma[:2], [GuidanceBranch(prefix)])
    repeated = model.denoise_step(latents, sigma, [GuidanceBranch(prefix.repeat_interleave(2))])
    torch.testing.assert_close(repeated, single.repeat_interleave(2, dim=0), **CLOSE)


def test_without_the_interaction_every_image_is_encoded_alone():
    model = hydra_model(use_source_interaction=False)
    source, target = gaussian(2, 6, 2, 2)
    torch.testing.assert_close(embeds(model, source, target, sources=[0, 1]), embeds(model, source, target))
    ids = left_padded([[1, *sequence("image"), 5, START]])
    assert model.prefill(**ids, pixel_values=pictures(1), source_interaction=True).sources is None


def test_an_edit_without_images_is_refused(model):
    with pytest.raises(ValueError, match="needs the images that it changes"):
        model.prefill(**left_padded([[1, 5, START]]), source_interaction=True)


def test_sources_of_other_sizes_in_each_prompt_are_refused(model):
    ids = left_padded([[1, *sequence("image"), START], [1, *sequence("image", num_tokens=3), START]])
    from hydra_hf.modeling.grid import pack_images

    pixel_values, grids = pack_images([pictures(1)[0], pictures(1, PATCH, 2 * PATCH)[0]], PATCH)
    with pytest.raises(ValueError, match="of the same sizes"):
        model.prefill(**ids, pixel_values=pixel_values, image_grid_thw=grids, source_interaction=True)


@pytest.mark.parametrize("num_sources", [[1, 0], [0, 2], [0, 1, 1], [0, -1]])
def test_sources_that_do_not_exist_or_are_targets_are_refused(num_sources):
    with pytest.raises(ValueError, match="num_sources"):
        group_targets([GRID] * len(num_sources), num_sources)
