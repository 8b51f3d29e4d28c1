import pytest
import torch
from tiny import gaussian, pictures

from hydra_hf.modeling.grid import (
    aspect_buckets,
    image_grids,
    latents_to_tokens,
    num_tokens,
    pack_images,
    pack_levels,
    patchify,
    per_token,
    position_features,
    rotary_positions_2d,
    run_by_grid,
    sinusoidal_positions_2d,
    tokens_to_latents,
    unpack_images,
    unpatchify,
)
from hydra_hf.modeling.image_processing_hydra import normalize_levels, packed_pixel_values


WIDE, TALL, SQUARE = (1, 2, 3), (1, 3, 2), (1, 2, 2)


def test_unpatchify_undoes_patchify_on_any_grid():
    images = pictures(2, height=8, width=12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 2 * 3, 3 * 4 * 4)
    assert torch.equal(unpatchify(patches, 4, (1, 2, 3)), images)


def test_a_patch_lists_the_channels_first_and_the_grid_goes_by_rows():
    images = pictures(1, height=8, width=12)
    patches = patchify(images, 4)
    for row in range(2):
        for column in range(3):
            patch = images[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(patches[0, 3 * row + column], patch.flatten())


def test_latents_and_tokens_have_the_same_order_as_patches():
    latents = gaussian(2, 5, 2, 3)
    tokens = latents_to_tokens(latents)
    assert torch.equal(tokens[:, 3 * 1 + 2], latents[:, :, 1, 2])
    assert torch.equal(tokens_to_latents(tokens, (1, 2, 3)), latents)


def test_sinusoids_tell_the_row_in_one_half_and_the_column_in_the_other():
    positions = sinusoidal_positions_2d([(1, 2, 3)], 16, like=torch.zeros(1)).unflatten(0, (2, 3))
    assert positions.shape == (2, 3, 16)
    assert torch.equal(positions[:, 0, :8], positions[:, 2, :8])
    assert torch.equal(positions[0, :, 8:], positions[1, :, 8:])
    assert len(positions.flatten(0, 1).unique(dim=0)) == 6


def test_sinusoids_do_not_depend_on_the_size_of_the_grid():
    small = sinusoidal_positions_2d([(1, 2, 3)], 16, like=torch.zeros(1)).unflatten(0, (2, 3))
    large = sinusoidal_positions_2d([(1, 5, 7)], 16, like=torch.zeros(1)).unflatten(0, (5, 7))
    assert torch.equal(large[:2, :3], small)


@pytest.mark.parametrize("positions", [sinusoidal_positions_2d, rotary_positions_2d], ids=["sinusoids", "rotary"])
def test_positions_of_a_row_of_images_are_those_of_each_alone(positions):
    def of(*grids):
        made = positions(grids, 16, torch.zeros(1))
        return made if isinstance(made, torch.Tensor) else torch.cat(made, dim=-1)

    assert torch.equal(of(WIDE, SQUARE, TALL), torch.cat([of(WIDE), of(SQUARE), of(TALL)]))


def test_features_of_a_row_of_images_are_those_of_each_alone():
    alone = [position_features([grid], torch.zeros(1)) for grid in (WIDE, SQUARE, TALL)]
    assert torch.equal(position_features([WIDE, SQUARE, TALL], torch.zeros(1)), torch.cat(alone))


def test_packed_images_come_back_in_their_order_and_sizes():
    images = [pictures(1, 8, 12)[0], pictures(1, 4, 4)[0], pictures(1, 8, 12, seed=1)[0]]
    pixel_values, image_grid_thw = pack_images(images, 4)
    assert image_grid_thw.tolist() == [[1, 2, 3], [1, 1, 1], [1, 2, 3]]
    assert pixel_values.shape == (6 + 1 + 6, 48)
    for image, unpacked in zip(images, unpack_images(pixel_values, image_grid_thw, 4), strict=True):
        assert torch.equal(image, unpacked)


@pytest.mark.parametrize("is_decoded", [True, False])
def test_packed_levels_are_the_packed_pixels_to_the_bit(is_decoded):
    levels = [torch.randint(0, 256, (8, 12, 3)), torch.randint(0, 256, (4, 4, 3)), torch.randint(0, 256, (12, 8, 3))]
    levels = [image.to(torch.uint8).permute(2, 0, 1) for image in levels]  # as a decoder writes them
    levels = levels if is_decoded else [image.contiguous() for image in levels]
    packed = pack_levels(levels, 4)
    assert (packed.dtype, packed.shape) == (torch.uint8, (6 + 1 + 6, 48))
    expected, _ = pack_images([normalize_levels(image) for image in levels], 4)
    assert torch.equal(packed_pixel_values(packed), expected)
    assert packed_pixel_values(expected) is expected


def test_one_value_for_each_image_is_repeated_for_its_tokens():
    assert per_token(torch.tensor([7, 8]), [SQUARE, (1, 1, 3)]).tolist() == [7, 7, 7, 7, 8, 8, 8]
    assert per_token(torch.tensor([7, 8]), [(1, 1, 2)] * 2).tolist() == [7, 7, 8, 8]


def test_images_of_one_grid_share_a_call_and_come_back_in_their_order():
    grids, calls = [WIDE, SQUARE, WIDE, TALL], []
    tokens, sigma = gaussian(sum(map(num_tokens, grids)), 5), torch.arange(4.0)

    def function(rows, sigma, *, grids):
        calls.append((tuple(rows.shape), sigma.tolist(), list(grids)))
        return torch.cat([rows[:, :1], rows + sigma[:, None, None]], dim=1)  # a token more for each image

    output = run_by_grid(function, grids, [tokens], [sigma])
    assert calls == [
        ((2, 6, 5), [0.0, 2.0], [WIDE]), ((1, 4, 5), [1.0], [SQUARE]), ((1, 6, 5), [3.0], [TALL]),
    ]  # fmt: skip
    parts = zip(tokens.split([6, 4, 6, 6]), sigma)
    assert torch.equal(output, torch.cat([torch.cat([part[:1], part + level]) for part, level in parts]))


def test_images_of_one_size_are_one_call_without_a_copy():
    tokens = gaussian(12, 5)
    output = run_by_grid(lambda rows, *, grids: rows, [WIDE, WIDE], [tokens])
    assert output.data_ptr() == tokens.data_ptr()


@pytest.mark.parametrize("max_tokens", [1, 2, 16, 256, 1024])
def test_buckets_use_up_the_budget_and_keep_the_aspect_in_bounds(max_tokens):
    buckets = aspect_buckets(max_tokens, max_aspect_ratio=2)
    assert len(set(buckets)) == len(buckets)
    for h, w in buckets:
        assert h * w <= max_tokens < min((h + 1) * w, h * (w + 1))
        assert 0.5 <= h / w <= 2
    assert {(w, h) for h, w in buckets} == set(buckets)
    side = int(max_tokens**0.5)
    assert side**2 != max_tokens or (side, side) in buckets


@pytest.mark.parametrize(
    ("grid", "message"),
    [([1, 2], "must be"), ([[0, 2, 2]], r"\(0, 2, 2\), expected \(t, h, w\)"), ([[1, 0, 2]], "at least one patch")],
)
def test_what_is_no_grid_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        image_grids(torch.tensor(grid))


@pytest.mark.parametrize("arguments", [(0, 2), (4, 0.5)])
def test_buckets_of_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        aspect_buckets(*arguments)
