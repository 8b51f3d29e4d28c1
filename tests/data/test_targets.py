"""Depth maps and boundaries that other models make of images."""

import numpy as np
import pytest
import tiny_painters
import torch
from PIL import Image

from hydra_hf.data.painting import boundary_pixels
from hydra_hf.data.targets import (
    MASK_SETTINGS,
    DepthPainter,
    SegmentPainter,
    boundaries,
    depth_input_size,
    draw_boundaries,
    drawn_size,
    image_policy,
)
from hydra_hf.modeling.image_processing_hydra import center_crop
from hydra_hf.toy.world import ToyWorld


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with `depth` and `segment`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_painters.save_depth_model(folder / "depth")
    tiny_painters.save_segment_model(folder / "segment")
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a ramp: no two places alike."""
    noise = np.random.default_rng(seed).uniform(0, 100, (height, width, 3))
    return Image.fromarray((noise + np.linspace(0, 150, width)[:, None]).astype(np.uint8))


# Depth


@pytest.mark.parametrize(
    ("width", "height", "size"),  # of Depth-Anything's own code, as (height, width)
    [
        (640, 480, (518, 686)), (640, 427, (518, 770)), (427, 640, (770, 518)), (500, 375, (518, 686)),
        (1024, 768, (518, 686)), (336, 336, (518, 518)), (640, 360, (518, 924)), (512, 512, (518, 518)),
    ],
)  # fmt: skip
def test_the_size_of_an_input_is_that_of_the_models_own_code(width, height, size):
    assert depth_input_size(height, width, (518, 518), 14) == size


def cubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Keys' cubic with a = -0.75 and repeated borders, as OpenCV has it: (new_size, size)."""
    a, matrix = -0.75, np.zeros((new_size, size))
    for row in range(new_size):
        centre = (row + 0.5) * size / new_size - 0.5
        for column in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - column)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[row, min(max(column, 0), size - 1)] += near if x <= 1 else far if x < 2 else 0
    return matrix


@pytest.mark.parametrize(("width", "height"), [(80, 40), (70, 120)])
def test_pixels_go_into_the_model_as_its_own_code_has_them(models, width, height):
    painter, image = DepthPainter(str(models / "depth"), "cpu"), picture(width, height)
    new_height, new_width = depth_input_size(height, width, (56, 56), 14)
    rows, columns = cubic_matrix(height, new_height), cubic_matrix(width, new_width)
    expected = rows @ (np.asarray(image) / 255).transpose(2, 0, 1) @ columns.T
    expected = (expected - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[
        :, None, None
    ]
    np.testing.assert_allclose(painter._pixel_values(image)[0].numpy(), expected, atol=1e-4)


def test_depth_has_the_size_of_the_image_and_the_whole_range(models):
    painter, image = DepthPainter(str(models / "depth"), "cpu"), picture(70, 45)
    depth = painter(image)
    assert depth.size == painter.target_size(*image.size) == (70, 45)
    levels = np.asarray(depth)
    assert levels.min() == 0
    assert levels.max() == 255
    assert (levels[..., 0] == levels[..., 2]).all()


def test_depth_is_the_models_and_not_the_pipelines(models):
    """The raw output, enlarged with its corners in the corners."""
    painter, image = DepthPainter(str(models / "depth"), "cpu"), picture(120, 80)
    with torch.inference_mode():
        raw = painter.model(pixel_values=painter._pixel_values(image)).predicted_depth[0]
    raw = (raw - raw.min()) / (raw.max() - raw.min())
    nearness = painter.nearness(image)
    scale = raw[0, 0] - raw[-1, -1]
    assert (nearness[0, 0] - nearness[-1, -1]) / scale > 0
    corners = torch.stack([raw[0, 0], raw[0, -1], raw[-1, 0], raw[-1, -1]])
    ours = torch.stack([nearness[0, 0], nearness[0, -1], nearness[-1, 0], nearness[-1, -1]])
    assert np.corrcoef(corners, ours)[0, 1] > 0.999


def test_near_is_white_whatever_the_model_measures(models, tmp_path):
    relative = DepthPainter(str(models / "depth"), "cpu")
    metric = DepthPainter(
        str(tiny_painters.save_depth_model(tmp_path / "metric", depth_estimation_type="metric", max_depth=20)), "cpu"
    )
    image = picture(80, 60)
    order = np.corrcoef(relative.nearness(image).flatten(), metric.nearness(image).flatten())[0, 1]
    assert order < -0.5  # the same weights, whose output now means distance: inverted


def test_one_distance_everywhere_is_black_and_one_that_is_none_is_refused(models):
    painter = DepthPainter(str(models / "depth"), "cpu")
    head = painter.model.head.conv3
    torch.nn.init.zeros_(head.weight)
    assert not np.asarray(painter(picture(60, 60))).any()
    torch.nn.init.constant_(head.bias, torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        painter(picture(60, 60))


def test_a_model_of_another_kind_is_refused(models):
    with pytest.raises(ValueError, match="of type 'sam', expected 'depth_anything' or 'dpt'"):
        DepthPainter(str(models / "segment"), "cpu")


# Boundaries


def test_boundaries_lie_inside_the_mask_and_not_on_the_pictures_border():
    drawing = """
        # # # . . . . .
        # # # . . # # #
        # # # . . # # #
        . . . . . # # #
        . . # . . # # #"""
    expected = """
        . . # . . . . .
        . . # . . # # #
        # # # . . # . .
        . . . . . # . .
        . . # . . # . ."""
    mask, lines = (
        torch.tensor([[c == "#" for c in row.split()] for row in text.split("\n")[1:]]) for text in (drawing, expected)
    )
    assert torch.equal(boundaries(mask[None]), lines)
    assert not boundaries(torch.ones(1, 5, 8, dtype=torch.bool)).any()
    assert not boundaries(torch.zeros(0, 5, 8, dtype=torch.bool)).any()


@pytest.mark.parametrize("difficulty", [1, 3])
def test_boundaries_of_the_toy_worlds_objects_are_the_toy_worlds(difficulty):
    world = ToyWorld(difficulty)
    scenes = world.sample_scenes(16, torch.Generator().manual_seed(0), canvas=(64, 96))
    for masks, expected in zip(world.object_masks(scenes), world.render_segmentation(scenes)):
        assert torch.equal(boundaries(masks), expected[0] == 1)
        drawn = draw_boundaries(masks, *scenes.canvas, device="cpu")
        assert torch.equal(torch.from_numpy(np.array(drawn)[..., 0]) == 255, expected[0] == 1)


def test_masks_are_drawn_in_another_size_with_lines_of_one_pixel():
    mask = torch.zeros(90, 120, dtype=torch.bool)
    mask[30:60, 30:90] = True
    lines = np.asarray(draw_boundaries([mask], 45, 60, "cpu"))[..., 0] == 255
    assert lines.sum() == 2 * 30 + 2 * 13  # the outline of 15 x 30
    assert not np.asarray(draw_boundaries([], 45, 60, "cpu")).any()


# Segments


@pytest.mark.parametrize("size", ["448", "448x448", "64"])
@pytest.mark.parametrize(("width", "height"), [(640, 480), (333, 500), (64, 64), (900, 300)])
def test_training_takes_the_lines_as_they_are_drawn(size, width, height):
    image_processor = image_policy(size, 14)
    target_width, target_height = drawn_size(width, height, image_processor)
    lines = np.zeros((target_height, target_width), np.uint8)
    lines[::7] = lines[:, ::5] = 255
    trained = image_processor.generated_size(height, width)
    middle = np.asarray(center_crop(Image.fromarray(lines), *trained))
    assert middle.shape == trained
    pixels = boundary_pixels(Image.fromarray(lines), *trained, image_processor)
    assert torch.equal(pixels[0] == 1, torch.from_numpy(middle == 255))


def test_masks_of_a_sam_become_lines(models):
    painter, image = SegmentPainter(str(models / "segment"), "cpu", image_policy("64x64", 8), 2), picture(96, 72)
    masks = [torch.as_tensor(mask) for mask in painter.generator(image, **painter.mask_settings)["masks"]]
    assert masks
    lines = np.asarray(painter(image))
    assert lines.shape == (64, 85, 3)  # of the image, 64 pixels high where training takes 64 x 64
    assert set(np.unique(lines)) == {0, 255}
    assert (lines == np.asarray(draw_boundaries(masks, 64, 85, "cpu"))).all()


def test_an_image_without_masks_is_black(models):
    painter = SegmentPainter(str(models / "segment"), "cpu", image_policy("64x64", 8), 2)
    torch.nn.init.constant_(painter.generator.model.mask_decoder.iou_prediction_head.proj_out.bias, -1.0)
    assert not np.asarray(painter(picture(96, 72))).any()


def test_the_settings_of_sam_are_the_papers():
    """The defaults of SAM's own generator, which the pipeline of transformers has as well."""
    from inspect import signature

    from transformers import MaskGenerationPipeline

    defaults = {
        name: parameter.default
        for step in (
            MaskGenerationPipeline.preprocess,
            MaskGenerationPipeline._forward,
            MaskGenerationPipeline.postprocess,
        )
        for name, parameter in signature(step).parameters.items()
    }
    assert {name: defaults[name] for name in MASK_SETTINGS} == MASK_SETTINGS
    assert (defaults["crops_n_layers"], defaults["mask_threshold"], defaults["stability_score_offset"]) == (0, 0, 1)


@pytest.mark.parametrize("size", ["", "x", "448x", "a", "7", "448x448x448", "-3"])
def test_a_size_of_another_form_is_refused(size):
    with pytest.raises(ValueError, match="must be like 448 or 448x448"):
        image_policy(size, 14)
