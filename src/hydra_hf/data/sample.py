"""One training sample of any task: a chat. Images and clips in a user's turn are given, in an assistant's turn generated."""

from dataclasses import dataclass

from torch import Tensor

from .tasks import check_task


@dataclass(frozen=True, kw_only=True)
class Sample:
    """`messages` are those of the chat template. The `image` of an image part is its pixels (3, H, W), floats in [-1, 1]
    or uint8 levels from 0 to 255; or it is the grid of the image, and `latent_mean` is the mean (N, C) of its latents
    before they are normalised. The `video` of a part is a clip (3, T, H, W), in the same values. An image of the assistant with
    `is_given` true was generated in another sample.

    Args:
        encoding: what `HydraProcessor.encode_each` gives for these messages, if it is known.
    """

    task: str
    messages: list[dict]
    encoding: dict[str, Tensor] | None = None

    def __post_init__(self):
        check_task(self.task, "A sample")
