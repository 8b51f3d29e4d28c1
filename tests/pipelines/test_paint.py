"""A picture and a prompt in, a picture out."""

import pytest
import torch
from PIL import Image

import hydra_hf
from hydra_hf import HydraPipeline
from hydra_hf.pipelines.painting import paint


@pytest.fixture(scope="module")
def pipeline() -> HydraPipeline:
    return HydraPipeline.from_pretrained(hydra_hf.TINY)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]


def paint_twice(pipeline, images, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return paint(pipeline.model, pipeline.processor, images, ["depth"] * len(images), 2, generator, **options)


def test_a_picture_for_each(pipeline, images):
    painted = paint_twice(pipeline, images)
    assert [tuple(picture.shape) for picture in painted] == [(3, 64, 64)] * 2


def test_the_image_is_looked_at(pipeline, images):
    first, second = paint_twice(pipeline, images)[0], paint_twice(pipeline, images[::-1])[0]
    assert not torch.allclose(first, second, atol=1e-3)  # the same noise and prompt


def test_lists_of_different_length(pipeline, images):
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        paint(pipeline.model, pipeline.processor, images, ["depth"])
