import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from huggingface_hub import close_session
from PIL import Image

from hydra_hf.modeling.grid import unpack_images
from hydra_hf.modeling.image_processing_hydra import HydraImageProcessor, center_crop, whole_size


SIZE = {"height": 28, "width": 42}


@pytest.fixture
def image_processor() -> HydraImageProcessor:
    return HydraImageProcessor(size=SIZE)


def photo(height: int = 50, width: int = 60) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([rows * 5, columns * 4, rows + columns], axis=-1).astype(np.uint8))


def images_of(processed) -> list[torch.Tensor]:
    return unpack_images(**processed, patch_size=14)


def pixels(image_processor, image, **kwargs) -> torch.Tensor:
    """Images of one size, (B, 3, H, W)."""
    return torch.stack(images_of(image_processor(image, return_tensors="pt", **kwargs)))


def test_black_is_minus_one_and_white_is_one(image_processor):
    black, white = pixels(image_processor, [Image.new("RGB", (5, 5)), Image.new("RGB", (9, 7), "white")])
    assert black.shape == (3, 28, 42)
    assert black.dtype == torch.float32
    torch.testing.assert_close(black, torch.full_like(black, -1))
    torch.testing.assert_close(white, torch.full_like(white, 1))


def test_images_are_packed_patch_by_patch_with_their_grids(image_processor):
    processed = image_processor([photo(), photo().rotate(180)], return_tensors="pt")
    assert set(processed) == set(image_processor.model_input_names)
    assert processed["image_grid_thw"].tolist() == [[1, 2, 3], [1, 2, 3]]
    first = pixels(image_processor, photo())[0]
    assert torch.equal(processed["pixel_values"][1 * 3 + 2], first[:, 14:28, 28:42].flatten())


def test_by_default_an_image_keeps_its_aspect_within_448_pixels_squared():
    sizes = {(50, 60): (56, 56), (448, 448): (448, 448), (300, 150): (294, 154), (900, 900): (448, 448),
             (800, 1600): (308, 630), (1600, 800): (630, 308), (10, 10): (56, 56)}  # fmt: skip
    for size, expected in sizes.items():
        assert pixels(HydraImageProcessor(), photo(*size)).shape == (1, 3, *expected)
        assert HydraImageProcessor().output_size(*size) == expected


@pytest.mark.parametrize("height", [1, 3, 14, 97, 448, 1000, 20_000])
@pytest.mark.parametrize("width", [1, 20, 333, 448, 5000])
@pytest.mark.parametrize("limits", [(56 * 56, 448 * 448), (14 * 14, 14 * 14 * 5), (100_352, 100_352)])
def test_the_limits_hold_for_any_image_and_the_aspect_where_patches_allow(height, width, limits):
    h, w = whole_size(height, width, 14, *limits)
    assert h % 14 == w % 14 == 0
    assert h * w <= limits[1]
    assert min(h, w) >= 14
    if min(h, w) > 5 * 14:
        assert abs(np.log(h / w) - np.log(height / width)) < 0.25
        assert h * w > 0.8 * limits[0]


def test_an_image_of_whole_patches_within_the_limits_keeps_its_pixels():
    image = photo(70, 98)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(pixels(HydraImageProcessor(), image), expected, atol=1e-6, rtol=0)


def outer_quarters(height: int = 800, width: int = 1600) -> Image.Image:
    """White, its left quarter red and its right quarter blue."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 4, height))
    image.paste("blue", (width - width // 4, 0, width, height))
    return image


@pytest.mark.parametrize("size", [SIZE, {"min_pixels": 56 * 56, "max_pixels": 448 * 448}])
def test_a_given_image_is_seen_whole(size):
    (image,) = pixels(HydraImageProcessor(size=size), outer_quarters())
    red, blue = ((image - torch.tensor(colour)[:, None, None]).abs().amax(0) < 0.1
                 for colour in ([1.0, -1, -1], [-1.0, -1, 1]))  # fmt: skip
    assert red.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert blue.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_images_of_different_sizes_come_in_their_order():
    processed = HydraImageProcessor()([outer_quarters(), photo(70, 98), outer_quarters()], return_tensors="pt")
    assert processed["image_grid_thw"].tolist() == [[1, 22, 45], [1, 5, 7], [1, 22, 45]]
    first, second, third = images_of(processed)
    assert torch.equal(first, third)
    assert torch.equal(second, pixels(HydraImageProcessor(), photo(70, 98))[0])


@pytest.mark.parametrize(
    ("size", "expected"), [((800, 1600), (322, 616)), ((1600, 800), (616, 322)), ((500, 500), (448, 448)),
                           ((10, 1000), (322, 616)), ((640, 480), (518, 378))]
)  # fmt: skip
def test_an_image_to_be_generated_is_the_middle_in_the_nearest_aspect(size, expected):
    image_processor = HydraImageProcessor()
    assert image_processor.generated_size(*size) == expected
    image = photo(*size)
    (given,) = images_of(image_processor.preprocess_generated(image, return_tensors="pt"))
    assert given.shape[1:] == expected
    middle = center_crop(image, *expected).resize(expected[::-1], Image.Resampling.BICUBIC)
    difference = given - (torch.from_numpy(np.array(middle)).permute(2, 0, 1) / 127.5 - 1)
    assert difference.abs().mean() < 0.5 / 127.5


def test_under_a_fixed_size_an_image_to_be_generated_is_cut_to_its_shape(image_processor):
    assert image_processor.generated_size(800, 1600) == (28, 42)
    (image,) = images_of(image_processor.preprocess_generated(outer_quarters(), return_tensors="pt"))
    assert image.shape == (3, 28, 42)
    assert (image[:, :, 7:35] > 0.8).all()  # white: of the coloured quarters a twelfth of the width is left


@pytest.mark.parametrize(
    "size, box", [((40, 20), (10, 0, 30, 20)), ((20, 50), (0, 15, 20, 35)), ((7, 7), (0, 0, 7, 7))]
)
def test_the_middle_of_a_picture_is_kept(size, box):
    picture = Image.effect_noise(size, 50)
    assert center_crop(picture, 32, 32).tobytes() == picture.crop(box).tobytes()


def test_a_cut_has_the_shape_of_the_size():
    assert center_crop(Image.new("L", (100, 100)), 16, 32).size == (100, 50)


def test_pixel_values_stay_in_range_where_bicubic_overshoots(image_processor):
    board = np.indices((10, 10)).sum(0) % 2
    for image in (board.astype(bool), board.astype(np.float32), torch.from_numpy(board * 2.0 - 1)):
        pixel_values = pixels(image_processor, image)
        assert -1 <= pixel_values.min() < -0.99
        assert 0.99 < pixel_values.max() <= 1


def test_resizing_is_that_of_pil(image_processor):
    for image in (photo(), photo(12, 9), photo(500, 700)):
        theirs = image.resize((42, 28), Image.Resampling.BICUBIC)
        difference = pixels(image_processor, image)[0] - (
            torch.from_numpy(np.array(theirs)).permute(2, 0, 1) / 127.5 - 1
        )
        assert difference.abs().max() < 3 / 127.5
        assert difference.abs().mean() < 0.5 / 127.5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_composited_over_white(image_processor, mode):
    image = photo(28, 42).convert("L").convert(mode) if mode == "LA" else photo(28, 42).convert(mode)
    image.putalpha(0)
    torch.testing.assert_close(pixels(image_processor, image), torch.ones(1, 3, 28, 42))


def test_half_transparent_black_is_grey(image_processor):
    expected = torch.full((1, 3, 28, 42), 127 / 127.5 - 1)
    for image in (Image.new("RGBA", (42, 28), (0, 0, 0, 128)), np.full((28, 42, 4), [0, 0, 0, 128], np.uint8)):
        torch.testing.assert_close(pixels(image_processor, image), expected, atol=1e-5, rtol=0)


def test_a_transparent_palette_entry_is_white(image_processor, tmp_path):
    image = Image.new("P", (42, 28), 0)
    image.putpalette([255, 0, 0])
    image.save(tmp_path / "palette.png", transparency=0)
    torch.testing.assert_close(pixels(image_processor, str(tmp_path / "palette.png")), torch.ones(1, 3, 28, 42))


def test_sixteen_bits_are_scaled_and_not_clipped(image_processor, tmp_path):
    levels = np.linspace(0, 65535, 28 * 42).reshape(28, 42).astype(np.uint16)
    expected = torch.from_numpy(levels / 32767.5 - 1).float().expand(1, 3, 28, 42)
    image = Image.fromarray(levels)
    assert image.mode == "I;16"
    image.save(tmp_path / "depth.png")
    for source in (image, image.convert("I"), str(tmp_path / "depth.png"), tmp_path / "depth.png", levels):
        torch.testing.assert_close(pixels(image_processor, source), expected, atol=1 / 254, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_what_pil_makes_of_them(image_processor, mode):
    image = photo(28, 42).convert(mode)
    torch.testing.assert_close(pixels(image_processor, image), pixels(image_processor, image.convert("RGB")))


def test_one_image_is_the_same_from_pil_numpy_torch_file_and_base64(image_processor, tmp_path):
    image = photo(28, 42)
    image.save(tmp_path / "photo.png")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    text = base64.b64encode(buffer.getvalue()).decode()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy())
    expected = pixels(image_processor, image)
    for source in (
        array,
        array.transpose(2, 0, 1),
        array.astype(np.int64),
        array / 255,
        tensor,
        tensor.permute(2, 0, 1),
        tensor.permute(2, 0, 1) / 127.5 - 1,
        (tensor.permute(2, 0, 1) / 127.5 - 1).double(),
        str(tmp_path / "photo.png"),
        text,
        f"data:image/png;base64,{text}",
    ):
        torch.testing.assert_close(pixels(image_processor, source), expected, atol=1e-6, rtol=0)


def test_a_photo_of_a_turned_camera_stands_upright(image_processor, tmp_path):
    image = photo(42, 28)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    expected = pixels(image_processor, image.transpose(Image.Transpose.ROTATE_270))
    torch.testing.assert_close(pixels(image_processor, str(tmp_path / "turned.png")), expected)


def test_an_image_of_one_pixel_fills_the_picture(image_processor):
    colour = np.array([255, 0, 51], np.uint8)
    expected = torch.tensor([1, -1, -0.6]).view(1, 3, 1, 1).expand(1, 3, 28, 42)
    arrays = (colour[None, None], colour[:, None, None])
    for image in (Image.fromarray(arrays[0]), *arrays, *map(torch.from_numpy, arrays)):
        torch.testing.assert_close(pixels(image_processor, image), expected, atol=1e-5, rtol=0)


def test_batches_may_be_nested_lists_or_four_axes(image_processor):
    assert pixels(image_processor, [[photo()], [], [photo(3, 4), photo()]]).shape == (3, 3, 28, 42)
    assert pixels(image_processor, np.zeros((2, 28, 42, 3), np.uint8)).shape == (2, 3, 28, 42)


def test_huge_images_are_refused_by_size_and_limit(image_processor):
    with pytest.raises(ValueError, match="11x10.*max_input_pixels=100"):
        image_processor(Image.new("RGB", (10, 11)), max_input_pixels=100)
    with pytest.raises(ValueError, match="11x10.*max_input_pixels=100"):
        image_processor(np.zeros((11, 10, 3), np.uint8), max_input_pixels=100)
    assert image_processor.max_input_pixels == 178_956_970


def test_a_decompression_bomb_is_refused_before_it_is_decoded(image_processor, tmp_path):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match="bomb.png.*10000000000 pixels"):
        image_processor(str(tmp_path / "bomb.png"))


@pytest.mark.parametrize(
    "image", [Image.new("RGB", (0, 5)), np.zeros((0, 5, 3), np.uint8), torch.zeros(3, 5, 0)], ids=["pil", "np", "pt"]
)
def test_images_without_pixels_are_refused(image_processor, image):
    with pytest.raises(ValueError, match="no pixels"):
        image_processor(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "NoneType for an image"),
        ({"path": "cat.png"}, "dict for an image"),
        ([], "empty list"),
        ("no_such_cat.png", "'no_such_cat.png' cannot be read"),
        (np.zeros((5, 5, 7), np.uint8), r"\(5, 5, 7\)"),
        (np.zeros(5), r"\(5,\)"),
        (np.full((5, 5, 3), 200.0), r"\[200, 200\].*\[0, 1\]"),
        (torch.full((3, 5, 5), 200.0), r"\[200, 200\].*\[-1, 1\]"),
        (torch.full((3, 5, 5), torch.nan), "nan"),
        (np.full((5, 5, 3), 300), "int64 levels from 300"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image_processor, image, message):
    with pytest.raises(ValueError, match=message):
        image_processor(image)


def test_broken_files_are_refused_by_name(image_processor, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "png")
    for name, content in (("text.png", b"hello"), ("half.png", buffer.getvalue()[:3000]), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*cannot be read"):
            image_processor(str(tmp_path / name))
    with pytest.raises(ValueError, match="truncated"):
        image_processor(Image.open(tmp_path / "half.png"))


def test_a_broken_file_deep_in_folders_is_named_to_its_end_and_a_text_is_cut(image_processor, tmp_path):
    folder = tmp_path / ("deep" * 25)
    folder.mkdir()
    (folder / "text.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match="text.png' cannot be read"):
        image_processor(str(folder / "text.png"))
    with pytest.raises(ValueError, match=r"'(QUJD){20}\.\.\.' cannot be read"):
        image_processor("QUJD" * 100)


def test_sizes_off_the_patch_grid_are_refused(image_processor):
    with pytest.raises(ValueError, match="30x28.*patch_size=14"):
        type(image_processor)(size={"height": 30, "width": 28})
    with pytest.raises(ValueError, match="28x30.*patch_size=14"):
        image_processor(photo(), size={"height": 28, "width": 30})
    with pytest.raises(ValueError, match="height=50 and width=60.*patch size 14"):
        image_processor(photo(), do_resize=False)
    for size in ({"shortest_edge": 28}, {"longest_edge": 4000}):
        with pytest.raises(ValueError, match="a height and a width, or min_pixels and max_pixels"):
            type(image_processor)(size=size)(photo())
    for least, most in ((4000, 3999), (1, 14 * 14 - 1)):
        with pytest.raises(ValueError, match="max_pixels of at least"):
            type(image_processor)(size={"min_pixels": least, "max_pixels": most})(photo())
    assert type(image_processor)(size={"height": 32, "width": 16}, patch_size=16).patch_size == 16
    assert pixels(image_processor, photo(28, 56), do_resize=False).shape == (1, 3, 28, 56)


def test_postprocess_undoes_preprocessing(image_processor):
    image = photo(28, 42)
    pixel_values = pixels(image_processor, [image, image.rotate(180)])
    pictures = image_processor.postprocess(pixel_values)
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(image))
    assert np.array_equal(np.asarray(pictures[1]), np.asarray(image.rotate(180)))
    assert image_processor.postprocess(pixel_values, output_type="np").shape == (2, 28, 42, 3)
    tensors = image_processor.postprocess(pixel_values, output_type="pt")
    torch.testing.assert_close(tensors * 2 - 1, pixel_values, atol=1e-6, rtol=0)


def test_postprocess_clamps_and_takes_half_precision(image_processor):
    pixel_values = torch.full((1, 3, 2, 2), 1.5, dtype=torch.bfloat16, requires_grad=True)
    assert np.asarray(image_processor.postprocess(pixel_values)[0]).min() == 255


def test_postprocess_refuses_what_it_cannot_show(image_processor):
    with pytest.raises(ValueError, match=r"\(3, 2, 2\)"):
        image_processor.postprocess(torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="'jpeg'"):
        image_processor.postprocess(torch.zeros(1, 3, 2, 2), output_type="jpeg")


def test_saving_and_loading_keeps_every_setting(image_processor, tmp_path):
    image_processor = type(image_processor)(size={"height": 32, "width": 64}, patch_size=16, max_input_pixels=5000)
    image_processor.save_pretrained(tmp_path)
    reloaded = type(image_processor).from_pretrained(tmp_path)
    assert reloaded.to_dict() == image_processor.to_dict()
    assert (reloaded.patch_size, reloaded.max_input_pixels) == (16, 5000)
    assert torch.equal(*(each(photo(), return_tensors="pt")["pixel_values"] for each in (reloaded, image_processor)))


def test_registering_for_an_auto_class_leaves_no_mark(image_processor):
    type(image_processor).register_for_auto_class()
    assert type(image_processor)._auto_class is None


def test_a_picture_of_the_network_says_when_the_library_is_offline(image_processor):
    with pytest.raises(
        ConnectionError, match=r"https://example\.com/cat\.png.* cannot be fetched: .*offline mode is enabled"
    ):
        image_processor.fetch_images("https://example.com/cat.png")


def test_a_server_that_does_not_answer_is_named(image_processor, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    close_session()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/cat\.png' cannot be fetched"):
        image_processor.fetch_images("http://127.0.0.1:9/cat.png")
    close_session()
