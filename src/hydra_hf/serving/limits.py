"""How much the server takes."""

from dataclasses import dataclass, field


def _limit(default: int, help_text: str):
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Limits:
    """What the server takes; more is refused with a status of 4xx."""

    max_batch_size: int = _limit(16, "most answers and images in work at once; the others wait")
    max_queue: int = _limit(1024, "most answers and images that wait")
    max_n: int = _limit(8, "most answers or images of one request")
    max_prompt_tokens: int = _limit(1 << 20, "longest prompt with its images, in tokens; the context is a limit too")
    max_inference_steps: int = _limit(100, "most denoising steps of an image")
    max_image_pixels: int = _limit(2048 * 2048, "largest image that is drawn, in pixels")
    max_input_images: int = _limit(16, "most images in one request")
    max_input_pixels: int = _limit(8192 * 8192, "largest image that is read, in pixels")
    max_body_bytes: int = _limit(32 << 20, "largest request, in bytes")
