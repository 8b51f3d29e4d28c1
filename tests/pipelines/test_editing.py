"""Edits and clips through `HydraPipeline`: sources at the size of what they become, branches of guidance, one error for each mistake."""

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_hf import HydraPipeline
from hydra_hf.modeling.grid import unpack_images
from hydra_hf.pipelines.editing import encode_sources, nested_sources


PATCH = 8


def picture(seed: int = 0, height: int = 2 * PATCH, width: int = 3 * PATCH) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline, *arguments, seed: int = 0, **options) -> torch.Tensor:
    return pipeline(*arguments, output_type="pt", generator=generator(seed), return_dict=False, **options)[0]


def test_an_edit_has_the_aspect_of_its_image(clip_pipeline):
    edited = clip_pipeline("make it red", image=picture(height=40, width=80), generator=generator()).images[0]
    assert isinstance(edited, Image.Image)
    assert edited.width / edited.height == pytest.approx(2, rel=0.5)
    assert edited.width > edited.height


def test_an_edit_depends_on_its_image_and_on_its_instruction(clip_pipeline):
    base = draw(clip_pipeline, "make it red", image=picture())
    assert not torch.allclose(draw(clip_pipeline, "make it red", image=picture(1)), base, atol=1e-3)
    assert not torch.allclose(draw(clip_pipeline, "a cat", image=picture()), base, atol=1e-3)
    torch.testing.assert_close(draw(clip_pipeline, "make it red", image=picture()), base)


def test_edits_in_a_batch_are_those_of_each_alone(clip_pipeline):
    prompts, images = ["make it red", "a cat"], [picture(), picture(1)]
    options = {"output_type": "pt", "return_dict": False}
    together = clip_pipeline(prompts, image=images, generator=[generator(0), generator(1)], **options)[0]
    for index, (prompt, image) in enumerate(zip(prompts, images)):
        alone = draw(clip_pipeline, prompt, image=image, seed=index)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_the_last_of_several_images_is_edited_and_the_others_matter(clip_pipeline):
    images = [picture(1, PATCH, PATCH), picture()]
    base = draw(clip_pipeline, "make it red", image=images)
    assert base.shape == draw(clip_pipeline, "make it red", image=picture()).shape
    assert not torch.allclose(
        draw(clip_pipeline, "make it red", image=[picture(2, PATCH, PATCH), picture()]), base, atol=1e-3
    )


def test_several_edits_of_one_image_each_have_their_own_noise(clip_pipeline):
    edits = draw(clip_pipeline, "make it red", image=picture(), num_images_per_prompt=2)
    assert len(edits) == 2
    assert not torch.allclose(edits[0], edits[1], atol=1e-3)


@pytest.mark.parametrize(("scales", "branches"), [((3.0, 1.5), 3), ((3.0, 1.0), 2), ((1.0, 1.5), 1)])
def test_each_scale_above_one_has_a_branch(clip_pipeline, monkeypatch, scales, branches):
    counts, step = set(), clip_pipeline.model.denoise_step
    monkeypatch.setattr(
        clip_pipeline.model, "denoise_step", lambda *args, **kwargs: counts.add(len(args[2])) or step(*args, **kwargs)
    )
    guidance_scale, image_guidance_scale = scales
    draw(
        clip_pipeline,
        "a cat",
        image=picture(),
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
    )
    assert counts == {branches}


def test_sources_are_what_training_makes_of_them(clip_pipeline):
    processor, image = clip_pipeline.processor, picture(height=50, width=90)
    sources = encode_sources(processor, image, 1)
    (pixels,) = unpack_images(sources.pixel_values, sources.grid_thw, PATCH)
    levels = processor.image_processor.generated_levels(image, sources.size)
    assert sources.size == processor.image_processor.generated_size(50, 90)
    torch.testing.assert_close(pixels, 2 * levels.float() / 255 - 1, atol=1e-6, rtol=0)


def test_a_clip_has_the_frames_asked_for(clip_pipeline):
    frames = clip_pipeline("a cat", num_frames=5, height=2 * PATCH, width=PATCH, generator=generator()).frames
    assert len(frames) == 1
    assert len(frames[0]) == 5
    assert frames[0][0].size == (PATCH, 2 * PATCH)
    latents = draw(clip_pipeline, "a cat", num_frames=5)
    assert latents.shape[:3] == (1, 5, 3)


def test_clips_from_given_noise_are_repeatable(clip_pipeline):
    noise = torch.randn(1, 4, 2, 2, 2, generator=generator())
    options = {"num_frames": 5, "height": 2 * PATCH, "width": 2 * PATCH, "output_type": "latent", "return_dict": False}
    first, second = (clip_pipeline("a cat", latents=noise, **options)[0] for _ in range(2))
    assert first.shape == noise.shape
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 6}, "num_frames=6 must be 1 \\+ 4n"),
        ({"num_frames": 5, "image": picture()}, "clips cannot be edited"),
        ({"image": []}, "expected as many"),
        ({"image": [[picture()], [picture()]]}, "for 1 prompts"),
        ({"image": Image.new("RGB", (0, 5))}, "image"),
        ({"num_frames": 401}, "the context has"),
    ],
)
def test_what_cannot_be_drawn_is_one_error(clip_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        clip_pipeline("a cat", **options)


def test_edits_of_several_sizes_ask_for_one(clip_pipeline):
    images = [picture(height=8, width=32), picture(height=32, width=8)]
    with pytest.raises(ValueError, match="give height and width"):
        clip_pipeline(["a", "b"], image=images)
    assert len(clip_pipeline(["a", "b"], image=images, height=16, width=16).images) == 2


def test_images_are_given_to_prompts():
    assert nested_sources("a", 2) == [["a"], ["a"]]
    assert nested_sources(["a", "b"], 1) == [["a", "b"]]
    assert nested_sources(["a", "b"], 2) == [["a"], ["b"]]
    assert nested_sources([["a", "b"], ["c", "d"]], 2) == [["a", "b"], ["c", "d"]]


def test_a_saved_pipeline_edits_and_draws_clips_as_before(clip_pipeline, tmp_path):
    clip_pipeline.save_pretrained(tmp_path)
    opened = HydraPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert opened.config.default_image_guidance_scale == clip_pipeline.config.default_image_guidance_scale
    for options in ({"image": picture()}, {"num_frames": 5}):
        torch.testing.assert_close(draw(opened, "a cat", **options), draw(clip_pipeline, "a cat", **options))
