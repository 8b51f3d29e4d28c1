"""Images to packed `pixel_values` in [-1, 1], and back: which size they get, and what is cut off.

Images that a user gives are seen whole. Images that the model learns to generate are cropped to the nearest of a few aspect
ratios.
"""

import base64
import binascii
import math
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import get_session
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import ImageProcessingMixin  # noqa: F401, diffusers looks for it here
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, logging

from .grid import aspect_buckets, pack_images


logger = logging.get_logger(__name__)

WHITE = 255
ORIENTATION = 0x0112  # tag of EXIF


def as_pixel_values(image: Tensor) -> Tensor:
    """Pixels in [-1, 1], on the device of `image`: computed if it holds uint8 RGB levels, unchanged if it holds floats."""
    return image if image.is_floating_point() else normalize_levels(image)


def packed_pixel_values(packed: Tensor) -> Tensor:
    """`pixel_values` (total_patches, 3 p p) of levels of `pack_levels`, which are uint8; floats are pixels already."""
    if packed.is_floating_point():
        return packed
    patch_size = math.isqrt(packed.shape[1] // 3)
    return normalize_levels(packed.unflatten(1, (patch_size, patch_size, 3)).permute(0, 3, 1, 2).flatten(1))


def normalize_levels(levels: Tensor) -> Tensor:
    """RGB levels from 0 to 255, of any shape and type, as fp32 pixels in [-1, 1]."""
    return levels.to(torch.float32, copy=True).sub_(WHITE / 2).div_(WHITE / 2)


class HydraImageProcessorKwargs(ImagesKwargs, total=False):
    """
    Args:
        patch_size: side of the tokenizer's patch; heights and widths must be multiples of it.
        max_input_pixels: an image with more pixels is refused before it is decoded.
    """

    patch_size: int
    max_input_pixels: int


def read_image(source: str | os.PathLike, max_input_pixels: int) -> Image.Image:
    """The upright image behind a path, a URL or a base64 string, in its own mode.

    Raises ValueError for anything but an image, ConnectionError for a URL that cannot be fetched.
    """
    name = str(source)
    if len(name) > 80 and not os.path.isfile(source):  # a base64 string
        name = f"{name[:80]}..."
    try:
        image = Image.open(_image_file(source))
        check_image_size(image.height, image.width, max_input_pixels)
        return upright(image)
    except ConnectionError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError, binascii.Error) as error:  # SyntaxError: a broken PNG
        if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError) and error.errno is not None:
            raise  # the file system or the network, not the image
        raise ValueError(
            f"{name!r} cannot be read as an image ({error}), expected a path, a URL or a base64 string."
        ) from error


def _image_file(source: str | os.PathLike) -> BytesIO | Path:
    if os.path.isfile(source):
        return Path(source)
    source = str(source)
    if source.startswith(("http://", "https://")):
        return fetch_url(source)
    return BytesIO(base64.decodebytes(source.removeprefix("data:").split(",")[-1].encode()))


def fetch_url(url: str) -> BytesIO:
    """The file behind a URL. ConnectionError if it cannot be fetched."""
    try:
        response = get_session().get(url, follow_redirects=True)
        response.raise_for_status()
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise ConnectionError(f"{url!r} cannot be fetched: {error}") from error
    return BytesIO(response.content)


def check_image_size(height: int, width: int, max_input_pixels: int) -> None:
    """Raises ValueError for an image without pixels, or with more than `max_input_pixels`."""
    if height < 1 or width < 1:
        raise ValueError(f"The image is {height}x{width} (height x width): it has no pixels.")
    if height * width > max_input_pixels:
        raise ValueError(f"The image is {height}x{width} (height x width), more than {max_input_pixels=} pixels.")


def whole_size(height: int, width: int, patch_size: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size, in whole patches, for an image of `height` x `width` that is seen whole: its own if the limits allow it,
    otherwise one of its aspect ratio, as near as patches allow. An aspect ratio that does not fit the limits is lost."""
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    scale = max(scale, math.sqrt(min_pixels / (height * width)))
    sides = [side * scale / patch_size for side in (height, width)]
    rounded = [{max(1, math.floor(side)), math.ceil(side)} for side in sides]
    budget = max_pixels // patch_size**2
    fitting = [(h, w) for h in rounded[0] for w in rounded[1] if h * w <= budget]
    if not fitting:  # a strip that would be thinner than a patch
        fitting = [(1, budget) if width > height else (budget, 1)]

    def distance(size: tuple[int, int]) -> tuple[bool, float]:
        is_too_small = math.prod(size) * patch_size**2 < min_pixels
        return is_too_small, sum(abs(math.log(number / side)) for number, side in zip(size, sides))

    h, w = min(fitting, key=distance)
    return h * patch_size, w * patch_size


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part from the middle with the aspect ratio of `height` to `width`."""
    top, left, bottom, right = center_box(image.height, image.width, height, width)
    is_whole = (top, left, bottom, right) == (0, 0, image.height, image.width)
    return image if is_whole else image.crop((left, top, right, bottom))


def center_box(image_height: int, image_width: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of what `center_crop` takes of an image of `image_height` x `image_width`."""
    scale = min(image_height / height, image_width / width)
    crop_height, crop_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (image_height - crop_height) // 2, (image_width - crop_width) // 2
    return top, left, top + crop_height, left + crop_width


def upright(image: Image.Image) -> Image.Image:
    """The image, rotated as its EXIF orientation says; `ImageOps.exif_transpose` would copy upright ones, too."""
    image.load()  # a PNG may say so at its end
    return image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def pil_to_levels(image: Image.Image) -> Tensor:
    """The RGB levels 0 to 255 of a PIL image of any mode, transparency over white: (3, H, W)."""
    image = upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # what 16-bit PNGs open as; convert("RGB") clips at 255
        array = np.asarray(image).astype(np.int64)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"A PIL image of mode {image.mode!r} is read as 16-bit, got levels outside 0 to 65535.")
        return array_to_levels(torch.from_numpy(array.astype(np.uint16))[None])
    if image.mode == "F":
        return array_to_levels(torch.from_numpy(np.array(image))[None], float_range=(0, 1))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def array_to_levels(image: Tensor, float_range: tuple[float, float] = (-1, 1)) -> Tensor:
    """The RGB levels 0 to 255 of 1, 3 or 4 channels (RGBA, over white); floats keep their fractions: (3, H, W)."""
    if image.dtype == torch.bool:
        levels = image.to(torch.uint8) * WHITE
    elif image.dtype == torch.uint16:
        levels = (image.to(torch.float32) / 257).round().to(torch.uint8)
    elif image.is_floating_point():
        low, high = float_range
        image = image.to(torch.float32)
        if not ((image >= low - 1e-3) & (image <= high + 1e-3)).all():  # written so that NaN fails
            raise ValueError(
                f"Got a float image with values in [{image.min():.4g}, {image.max():.4g}], expected [{low}, {high}]: "
                "torch tensors in [-1, 1], numpy arrays and PIL images in [0, 1]. Levels 0 to 255 go in as uint8."
            )
        levels = (image.clamp(low, high) - low) * (WHITE / (high - low))
    else:
        if image.min() < 0 or image.max() > WHITE:
            raise ValueError(
                f"Got {image.dtype} levels from {image.min()} to {image.max()}, expected 0 to 255 (or uint16)."
            )
        levels = image.to(torch.uint8)
    if levels.shape[0] == 4:
        alpha = levels[3:].to(torch.float32) / WHITE
        composite = levels[:3] * alpha + WHITE * (1 - alpha)
        levels = composite if levels.is_floating_point() else composite.round().to(torch.uint8)
    return levels.expand(3, -1, -1)


def is_channels_last(shape: tuple[int, ...], default: ChannelDimension) -> bool:
    """Whether the last of three axes holds the channels; `default` decides if either could. Raises ValueError if neither can."""
    first, last = shape[0], shape[-1]
    if default == ChannelDimension.LAST:
        order = [(last in (3, 4), True), (first in (3, 4), False), (last == 1, True), (first == 1, False)]
    else:
        order = [(first in (3, 4), False), (last in (3, 4), True), (first == 1, False), (last == 1, True)]
    for holds, channels_last in order:
        if holds:
            return channels_last
    raise ValueError(f"Got an image of shape {tuple(shape)}, expected 1, 3 or 4 channels first or last.")


class HydraImageProcessor(TorchvisionBackend):
    """
    Images to `pixel_values` (total_patches, 3 p p) in [-1, 1] and `image_grid_thw` (num_images, 3), packed as in Qwen2-VL.

    Args:
        size: `{"min_pixels": ..., "max_pixels": ...}` of the result, which keeps the aspect ratio as nearly as patches allow; or `{"height": ..., "width": ...}`, the size of every image, which loses its aspect ratio.
        patch_size: side of the tokenizer's patch; heights and widths of the result are multiples of it.
        max_input_pixels: an image with more pixels is refused before it is decoded.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"min_pixels": 56 * 56, "max_pixels": 448 * 448}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    patch_size = 14
    max_input_pixels = 178_956_970  # where PIL itself speaks of a decompression bomb
    valid_kwargs = HydraImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]
    reads = "image"
    free_settings = frozenset(("size", "patch_size", "max_input_pixels", "resample"))  # in training, see `check_plain`

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoImageProcessor") -> None:
        """Does nothing: marking the installed class would make every later save copy this file into the folder."""

    def fetch_images(self, image_url_or_urls: ImageInput | str | os.PathLike | list) -> ImageInput | list:
        """Opens paths, URLs and base64 strings and returns other images unchanged; lists keep their nesting.

        Raises ValueError for other types.
        """
        images = image_url_or_urls
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, os.PathLike)):
            return read_image(images, self.max_input_pixels)  # upstream's readers drop alpha and clip 16 bits
        if isinstance(images, Image.Image):
            return images
        if isinstance(images, (np.ndarray, Tensor)):
            if images.ndim == 2:
                return images[..., None] if isinstance(images, np.ndarray) else images[None]
            if images.ndim in (3, 4):
                return images
            raise ValueError(f"Got an image of shape {tuple(images.shape)}, expected 2 or 3 axes, or a batch with 4.")
        raise ValueError(
            f"Got {type(images).__name__} for an image, expected PIL, numpy, torch, a path, a URL or a base64 string."
        )

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list:
        images = super()._prepare_images_structure(images, expected_ndims=expected_ndims)
        if len(images) == 0:
            raise ValueError("Got an empty list of images, expected at least one.")
        return images

    def _standardize_kwargs(self, patch_size: int, max_input_pixels: int, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        size = kwargs["size"]
        if size.height and size.width:
            if size.height % patch_size or size.width % patch_size:
                raise ValueError(
                    f"Got size {size.height}x{size.width} (height x width), expected multiples of {patch_size=}."
                )
        elif not (size.min_pixels and size.max_pixels):
            raise ValueError(f"Got size={dict(size)}, expected a height and a width, or min_pixels and max_pixels.")
        elif size.max_pixels < max(patch_size**2, size.min_pixels):
            raise ValueError(f"Got size={dict(size)}, expected a max_pixels of at least min_pixels and a patch.")
        return {**kwargs, "patch_size": patch_size, "max_input_pixels": max_input_pixels}

    def _levels(
        self,
        image: ImageInput,
        do_convert_rgb: bool,
        input_data_format: str | ChannelDimension | None,
        max_input_pixels: int,
    ) -> Tensor:
        """RGB levels from 0 to 255 of one image, (3, H, W)."""
        if isinstance(image, Image.Image):
            check_image_size(image.height, image.width, max_input_pixels)
            if not do_convert_rgb and image.mode != "RGB":
                raise ValueError(f"Got a PIL image of mode {image.mode!r} and {do_convert_rgb=}, expected mode 'RGB'.")
            try:
                image.load()  # Image.open() reads no further than the header
            except (OSError, SyntaxError) as error:
                raise ValueError(f"The PIL image cannot be read: {error}") from error
            return pil_to_levels(image)
        is_numpy = isinstance(image, np.ndarray)
        if input_data_format is None:
            default = ChannelDimension.LAST if is_numpy else ChannelDimension.FIRST
            channels_last = is_channels_last(image.shape, default)
        else:
            channels_last = ChannelDimension(input_data_format) == ChannelDimension.LAST
        height, width, num_channels = image.shape if channels_last else (*image.shape[1:], image.shape[0])
        check_image_size(height, width, max_input_pixels)
        if num_channels not in ((1, 3, 4) if do_convert_rgb else (3,)):
            raise ValueError(f"Got {num_channels} channels and {do_convert_rgb=}, expected 3 (or 1 or 4 to convert).")
        pixels = torch.from_numpy(np.array(image)) if is_numpy else image  # a copy: torch requires writable memory
        pixels = pixels.movedim(-1, 0) if channels_last else pixels
        if is_numpy:
            return array_to_levels(pixels, float_range=(0, 1))
        if pixels.is_floating_point() and pixels.min() >= 0:
            logger.warning_once(
                "A float tensor without a negative value is read as [-1, 1] like all tensors here; an image in [0, 1] "
                "must be passed as 2 * image - 1, as a numpy array or as uint8."
            )
        return array_to_levels(pixels)

    def to_levels(self, image: ImageInput) -> Tensor:
        """RGB levels from 0 to 255 of an image that is read as in a call, but not resized, (3, H, W)."""
        return self._levels(image, True, None, self.max_input_pixels)

    def output_size(self, height: int, width: int, **images_kwargs) -> tuple[int, int]:
        """Height and width of the result for an image of `height` x `width`, under the same overrides as a call."""
        names = ("do_resize", "size", "patch_size", "do_center_crop", "crop_size")
        options = {name: images_kwargs.get(name, getattr(self, name)) for name in names}
        if options["do_resize"]:
            height, width = self._resized(
                height, width, SizeDict(**get_size_dict(options["size"])), options["patch_size"]
            )
        if options["do_center_crop"]:
            size = get_size_dict(options["crop_size"], param_name="crop_size")
            height, width = size["height"], size["width"]
        return height, width

    def _resized(self, height: int, width: int, size: SizeDict, patch_size: int) -> tuple[int, int]:
        if size.height and size.width:
            return size.height, size.width
        return whole_size(height, width, patch_size, size.min_pixels, size.max_pixels)

    def generated_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which an image of `height` x `width` is used as one to be generated: of the sizes with the largest
        number of pixels, that of the nearest aspect ratio."""
        size = SizeDict(**self.size) if isinstance(self.size, dict) else self.size
        if size.height and size.width:
            return size.height, size.width
        buckets = aspect_buckets(size.max_pixels // self.patch_size**2)
        h, w = min(buckets, key=lambda bucket: abs(math.log(bucket[0] * width / (bucket[1] * height))))
        return h * self.patch_size, w * self.patch_size

    def preprocess_generated(self, image: Image.Image, **kwargs) -> BatchFeature:
        """What a call gives for an image that the model learns to generate: its middle part, at its `generated_size`."""
        image, (height, width) = self._crop_generated(image)
        return self(image, size={"height": height, "width": width}, **kwargs)

    def _crop_generated(
        self, image: Image.Image, size: tuple[int, int] | None = None
    ) -> tuple[Image.Image, tuple[int, int]]:
        check_image_size(image.height, image.width, self.max_input_pixels)
        image = upright(image)
        size = size or self.generated_size(image.height, image.width)
        return center_crop(image, *size), size

    # Levels: what training keeps in memory, a quarter of the pixels

    def check_plain(self) -> None:
        """Raises ValueError for settings under which a call does more than resize and normalise to [-1, 1]."""
        plain, own = type(self)().to_dict(), self.to_dict()
        for name in set(plain) - self.free_settings:
            if own[name] != plain[name]:
                raise ValueError(
                    f"The {self.reads} processor has {name}={own[name]!r}, expected {plain[name]!r} for training."
                )

    def given_levels(self, image: Image.Image) -> Tensor:
        """The RGB levels from 0 to 255, (3, H, W), that a call of a plain processor normalises; floats if levels have
        fractions."""
        levels = self.to_levels(image)
        return self._resized_levels(levels, *self.output_size(*levels.shape[-2:]))

    def generated_levels(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """As `given_levels`, for `preprocess_generated`; a `size` (height, width) that another image decides takes the place of
        the `generated_size`."""
        image, size = self._crop_generated(image, size)
        return self._resized_levels(self.to_levels(image), *size)

    def _resized_levels(self, levels: Tensor, height: int, width: int) -> Tensor:
        return self.resize(levels, SizeDict(height=height, width=width), resample=self.resample)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool = True,
        input_data_format: str | ChannelDimension | None = None,
        max_input_pixels: int = max_input_pixels,
        device: torch.device | str | None = None,
        **kwargs,
    ) -> Tensor:
        return self._levels(image, do_convert_rgb, input_data_format, max_input_pixels).to(device)

    def resize(self, image: Tensor, size: SizeDict, **kwargs) -> Tensor:
        if image.shape[-2:] == (size.height, size.width):
            return image
        resized = super().resize(image, size, **kwargs)
        return resized.clamp(0, WHITE) if resized.is_floating_point() else resized  # bicubic overshoots

    def rescale_and_normalize(self, images, do_rescale, rescale_factor, do_normalize, image_mean, image_std) -> Tensor:
        is_plain = do_rescale and do_normalize and rescale_factor == 1 / WHITE and {*image_mean, *image_std} == {0.5}
        if is_plain:  # as training does on its device, to the bit
            return normalize_levels(images)
        return super().rescale_and_normalize(images, do_rescale, rescale_factor, do_normalize, image_mean, image_std)

    def _preprocess(
        self, images: list[Tensor], size: SizeDict, patch_size: int, return_tensors: str | TensorType | None, **kwargs
    ) -> BatchFeature:
        pixel_values = []
        for image in images:
            height, width = self._resized(*image.shape[-2:], size, patch_size)
            own_size = SizeDict(height=height, width=width)
            pixel_values += super()._preprocess([image], size=own_size, return_tensors=None, **kwargs)["pixel_values"]
        packed, image_grid_thw = pack_images(pixel_values, patch_size)
        return BatchFeature({"pixel_values": packed, "image_grid_thw": image_grid_thw}, tensor_type=return_tensors)

    def postprocess(
        self, pixel_values: Tensor | list[Tensor], output_type: str = "pil"
    ) -> list[Image.Image] | list[np.ndarray] | list[Tensor] | np.ndarray | Tensor:
        """
        Images from `pixel_values` (B, 3, H, W) in [-1, 1], or a list of images from a list of (3, H, W) of any sizes.

        Args:
            output_type: "pil": a list; "np": (B, H, W, 3) in [0, 1]; "pt": (B, 3, H, W) in [0, 1].
        """
        if isinstance(pixel_values, list):
            return [self.postprocess(image[None], output_type)[0] for image in pixel_values]
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"Got pixel_values of shape {tuple(pixel_values.shape)}, expected (B, 3, H, W).")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"Got {output_type=}, expected 'pil', 'np' or 'pt'.")
        pictures = (pixel_values.detach().float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pictures
        pictures = pictures.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return pictures
        return [Image.fromarray(picture) for picture in (pictures * WHITE).round().astype(np.uint8)]
