"""Clips among the images of a sequence: read, scored and generated like images, whatever else is in the batch."""

import pytest
import torch
from tiny import (
    PATCH,
    START,
    clip_hydra_model,
    clips,
    gaussian,
    hydra_model,
    left_padded,
    pictures,
    randomized,
    sequence,
)
from torch import Tensor

from hydra_hf.modeling.flow import velocity_target
from hydra_hf.modeling.grid import latents_to_tokens, pack_images, pack_latents
from hydra_hf.modeling.image_generation import GuidanceBranch


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
IMAGE_TOKENS, CLIP_TOKENS = 1 + 4, 1 + 3 * 4  # 2x2 patches; 9 frames are 3 latent frames


@pytest.fixture(scope="module")
def model():
    return clip_hydra_model()


def row(*parts) -> list[int]:
    lengths = {"image": IMAGE_TOKENS, "video": CLIP_TOKENS}
    return [
        token for part in parts for token in (sequence(part, num_tokens=lengths[part]) if part in lengths else [part])
    ]


def states(model, ids: list[list[int]], **visuals) -> Tensor:
    inputs = left_padded(ids)
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return model(**inputs, position_ids=position_ids, **visuals).logits


def test_a_clip_and_an_image_in_one_batch_are_read_as_each_is_alone(model):
    image, clip = pictures(1), clips(1)
    together = states(model, [row(1, "image", 2), row(1, "video", 2)], pixel_values=image, pixel_values_videos=clip)
    alone_image = states(model, [row(1, "image", 2)], pixel_values=image)
    alone_clip = states(model, [row(1, "video", 2)], pixel_values_videos=clip)
    torch.testing.assert_close(together[:1, -alone_image.shape[1] :], alone_image, **CLOSE)
    torch.testing.assert_close(together[1:], alone_clip, **CLOSE)


def test_images_and_clips_apart_are_those_of_one_stream(model):
    image, clip, ids = pictures(1), clips(1), [row(1, "video", 2, "image", 3)]
    apart = states(model, ids, pixel_values=image, pixel_values_videos=clip)
    pixel_values, grids = pack_images([clip[0], image[0]], PATCH)
    torch.testing.assert_close(states(model, ids, pixel_values=pixel_values, image_grid_thw=grids), apart, **CLOSE)


def test_a_clip_of_one_frame_is_read_as_that_image(model):
    image = pictures(1)
    as_image = states(model, [row(1, "image", 2)], pixel_values=image)
    ids = [row(1, *sequence("video", num_tokens=IMAGE_TOKENS), 2)]
    as_clip = states(model, ids, pixel_values_videos=image[:, :, None])
    torch.testing.assert_close(as_clip[:, -1], as_image[:, -1], **CLOSE)


def test_the_order_of_frames_matters(model):
    clip, ids = clips(1), [row(1, "video", 2)]
    reversed_clip = clip.flip(2)
    assert not torch.allclose(
        states(model, ids, pixel_values_videos=clip), states(model, ids, pixel_values_videos=reversed_clip), atol=1e-3
    )


def test_answers_about_clips_in_a_batch_are_those_about_each_alone(model):
    clip, image = clips(1), pictures(1)
    ids = [row(1, "video", 2, "image", 3), row(1, "video", 4)]
    visuals = {"pixel_values_videos": torch.cat([clip, clips(1, seed=3)]), "pixel_values": image}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**left_padded(ids), **visuals, num_return_sequences=1, **options)
    for index, visual in enumerate([{"pixel_values_videos": clip, "pixel_values": image},
                                    {"pixel_values_videos": clips(1, seed=3)}]):  # fmt: skip
        alone = model.generate(**left_padded([ids[index]]), **visual, **options)
        assert together[index, -4:].tolist() == alone[0, -4:].tolist()


def test_the_flow_loss_of_a_batch_is_over_the_tokens_of_clips_and_images(model):
    image, clip = gaussian(1, 6, 2, 2), gaussian(1, 6, 3, 2, 2, seed=1)
    ids, sigma = left_padded([row(1, "image"), row(1, "video")]), torch.tensor([0.3, 0.6])
    tokens = torch.cat([latents_to_tokens(image)[0], latents_to_tokens(clip)[0]])
    grids = torch.tensor([(1, 2, 2), (3, 2, 2)])
    target = velocity_target(tokens, gaussian(16, 6, seed=2))
    is_generated = torch.ones(2, dtype=torch.bool)
    outputs = model(
        **ids, position_ids=(ids["attention_mask"].cumsum(-1) - 1).clamp(min=0), latents=tokens, image_grid_thw=grids,
        sigma=sigma, is_generated=is_generated, velocity_target=target,
    )  # fmt: skip
    alone = [
        model(
            **left_padded([row(1, name)]), latents=latents, sigma=sigma[i : i + 1], is_generated=is_generated[:1]
        ).velocity
        for i, (name, latents) in enumerate([("image", image), ("video", clip)])
    ]
    assert alone[1].shape == clip.shape
    expected = torch.cat([latents_to_tokens(velocity)[0] for velocity in alone])
    torch.testing.assert_close(outputs.velocity, expected, **CLOSE)
    torch.testing.assert_close(outputs.flow_loss, (expected - target).pow(2).mean(), **CLOSE)


def test_generated_clips_have_the_frames_asked_for_and_come_from_their_prompt(model):
    ids = torch.tensor([[1, 5, START], [1, 7, START]])
    options = {"num_frames": 9, "height": 8, "width": 12, "num_inference_steps": 2, "guidance_scale": 1.5}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    frames = model.generate_images(ids, **options, generator=generators)
    assert frames.shape == (2, 3, 9, 8, 12)
    alone = model.generate_images(ids[1:], **options, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(frames[1:], alone, atol=1e-4, rtol=1e-4)


def test_a_step_of_clips_is_the_training_forward(model):
    latents, sigma, ids = gaussian(1, 6, 3, 2, 2), torch.tensor([0.4]), [[1, 5, START]]
    prefix = model.prefill(**left_padded(ids))
    step = model.denoise_step(latents, sigma, [GuidanceBranch(prefix)])
    forward = model(
        **left_padded([row(1, 5, "video")]), latents=latents, sigma=sigma, is_generated=torch.tensor([True])
    )
    torch.testing.assert_close(step, forward.velocity, **CLOSE)


def test_packed_clips_of_several_sizes_are_decoded_as_each_alone(model):
    latents = [gaussian(6, 3, 2, 2), gaussian(6, 2, 1, 3, seed=1)]
    tokens = torch.cat([pack_latents(each[None], None)[0] for each in latents])
    decoded = model.decode_latents(tokens, torch.tensor([(3, 2, 2), (2, 1, 3)]))
    for frames, each in zip(decoded, latents):
        torch.testing.assert_close(frames, model.decode_latents(each[None])[0], **CLOSE)


@pytest.mark.parametrize(
    ("visuals", "message"),
    [
        ({"pixel_values_videos": clips(1, 8)}, "num_frames=8 must be 1 \\+ 4n"),
        ({"pixel_values_videos": clips(2)}, "placeholders"),
        ({"pixel_values_videos": clips(1), "pixel_values": pictures(1)}, "1 images and 1 clips"),
        ({"pixel_values_videos": clips(1)[0]}, "must be \\(B, 3, T, H, W\\), or packed"),
    ],
)
def test_clips_that_do_not_fit_are_refused(model, visuals, message):
    with pytest.raises(ValueError, match=message):
        states(model, [row(1, "video", 2)], **visuals)


def test_a_model_without_folds_refuses_clips():
    model = hydra_model()
    pixel_values, grids = pack_images([clips(1, 5)[0]], PATCH)
    with pytest.raises(ValueError, match="reads images alone"):
        states(model, [row(1, "image", 2)], pixel_values=pixel_values, image_grid_thw=grids)
    with pytest.raises(ValueError, match="reads images alone"):
        model.generate_images(torch.tensor([[1, START]]), num_frames=5)


def test_an_images_velocity_does_not_change_with_the_frames_positions():
    """The vision head turns with the frame as well: for images, by nothing."""
    model = randomized(hydra_model())
    assert model.vision_head(gaussian(1, 4, 32), gaussian(1, 4, 6), torch.tensor([0.5]), [(1, 2, 2)]).isfinite().all()
    frames = model.vision_head(gaussian(1, 8, 32), gaussian(1, 8, 6), torch.tensor([0.5]), [(2, 2, 2)])
    stacked = model.vision_head(gaussian(1, 8, 32), gaussian(1, 8, 6), torch.tensor([0.5]), [(1, 4, 2)])
    assert not torch.allclose(frames, stacked, atol=1e-4)
