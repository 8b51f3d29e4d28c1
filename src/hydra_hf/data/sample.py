"""One training sample of any task: a chat. Images in a user's turn are given, in an assistant's turn generated."""

from dataclasses import dataclass

from torch import Tensor

from .tasks import check_task


@dataclass(frozen=True, kw_only=True)
class Sample:
    """`messages` as the chat template takes them; an image part holds as `image` pixels (3, H, W), floats in [-1, 1]
    or their levels 0 to 255 in uint8; or in their place the grid of the image, and as `latent_mean` its latents' mean
    (N, C) before they are normalised.

    Args:
        encoding: what `HydraProcessor.encode_conversations` gives for the messages alone, (1, L) each, where it is known.
    """

    task: str
    messages: list[dict]
    encoding: dict[str, Tensor] | None = None

    def __post_init__(self):
        check_task(self.task, "A sample")
