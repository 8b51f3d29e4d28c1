"""Images in and out of requests: data URLs, and files of a form."""

import base64
import binascii
import io

from PIL import Image


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def decode_data_url(url: str, max_pixels: int) -> Image.Image:
    """The image of a `data:image/...;base64,` URL. Raises ValueError for any other URL: the server fetches nothing."""
    head, comma, payload = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError(
            f"Got the image URL {url[:60]!r}, expected data:image/...;base64,... : images are sent inline."
        )
    try:
        content = base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"Got an image whose base64 cannot be read: {error}.") from error
    return decode_image(content, max_pixels)


def decode_image(content: bytes, max_pixels: int) -> Image.Image:
    """The first picture of an image file. Raises ValueError if it cannot be read, or before decoding for too many pixels."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"Got an image of {image.width}x{image.height}, expected at most {max_pixels} pixels.")
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Got an image that cannot be read, expected one of {', '.join(FORMATS)}.") from error
    return image


def encode_image(image: Image.Image, output_format: str = "png", quality: int = 100) -> str:
    """The base64 of an image file. `quality` is for jpeg and webp."""
    content = io.BytesIO()
    options = {} if output_format == "png" else {"quality": quality}
    image.convert("RGB").save(content, output_format, **options)
    return base64.b64encode(content.getvalue()).decode("ascii")


def data_url(encoded: str, output_format: str = "png") -> str:
    return f"data:image/{output_format};base64,{encoded}"
