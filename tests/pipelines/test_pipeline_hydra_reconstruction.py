from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_hf.pipelines.pipeline_hydra_reconstruction import HydraReconstructionPipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 32, width: int = 32) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([rows * 5, columns * 4, rows + columns], axis=-1).astype(np.uint8))


@pytest.fixture
def pipeline(tiny_pipeline) -> HydraReconstructionPipeline:
    """From the parts of a pipeline that draws."""
    return HydraReconstructionPipeline(
        vision_tower=tiny_pipeline.model.model.vision_tower, image_processor=tiny_pipeline.processor.image_processor
    )


@torch.no_grad()
def test_a_reconstruction_is_the_decoded_mode(pipeline):
    image = pipeline(picture(), generator=seeded(), output_type="pt").images
    pixel_values = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipeline.vision_tower.encode(pixel_values).latent_dist.mode()
    expected = pipeline.vision_tower.decode(latents, generator=seeded()).sample
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert image.std() > 0.01


def test_pictures_come_at_the_size_of_the_processor(pipeline):
    images = pipeline([picture(50, 40), picture(20, 90)]).images
    assert [image.size for image in images] == [(32, 32)] * 2


def test_a_tensor_is_read_like_its_picture(pipeline):
    tensor = torch.from_numpy(np.array(picture())).permute(2, 0, 1) / 127.5 - 1
    of_tensor, of_picture = (pipeline(x, generator=seeded(), output_type="np").images for x in (tensor, picture()))
    np.testing.assert_allclose(of_tensor, of_picture, atol=1e-4)


def test_a_list_of_generators_equals_single_calls(pipeline):
    pictures = [picture(), picture(16, 64)]
    batch = pipeline(pictures, generator=[seeded(0), seeded(1)], output_type="np").images
    for seed in range(2):
        alone = pipeline(pictures[seed], generator=seeded(seed), output_type="np").images
        np.testing.assert_allclose(batch[seed : seed + 1], alone, atol=1e-5)


def test_more_steps_of_the_decoder_change_the_picture(pipeline):
    two, also_two, five = (
        pipeline(picture(), num_inference_steps=steps, generator=seeded(), output_type="np").images
        for steps in (None, 2, 5)
    )
    np.testing.assert_array_equal(two, also_two)
    assert np.abs(two - five).max() > 1e-3


def test_a_tuple_holds_the_same_picture_as_the_output(pipeline):
    output = pipeline(picture(), generator=seeded(), output_type="np")
    (images,) = pipeline(picture(), generator=seeded(), output_type="np", return_dict=False)
    np.testing.assert_array_equal(images, output.images)


def test_a_saved_pipeline_reconstructs_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = HydraReconstructionPipeline.from_pretrained(tmp_path)
    images, expected = (p(picture(), generator=seeded(), output_type="np").images for p in (loaded, pipeline))
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_bf16_weights_give_a_picture(pipeline):
    pipeline.to(torch.bfloat16)
    images = pipeline(picture(), output_type="np").images
    assert images.dtype == np.float32
    assert np.isfinite(images).all()


def test_model_offload_brings_the_tokenizer_for_every_call(pipeline):
    pipeline.enable_model_cpu_offload(device="cpu")
    hook = pipeline.vision_tower._hf_hook
    with patch.object(hook, "pre_forward", wraps=hook.pre_forward) as bring:
        pipeline(picture())
    assert bring.call_count == 2  # encode, decode


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image": None}, "NoneType"),
        ({"image": []}, "empty list"),
        ({"num_inference_steps": 0}, "num_inference_steps=0, expected an integer of at least 1"),
        ({"output_type": "latent"}, "output_type='latent', expected 'pil', 'np' or 'pt'"),
        ({"generator": [seeded(), seeded()]}, "2 as generator, expected one, or one for each of 1 images"),
    ],
)
def test_a_wrong_argument_is_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"image": picture(), **arguments})
