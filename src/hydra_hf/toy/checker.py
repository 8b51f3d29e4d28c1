"""Judges images of the toy world by matching every sprite at every place. Nothing is learned."""

import torch
from torch import Tensor

from .language import Prompt
from .world import SPRITE, ToyWorld, check_canvas, sprite_size


STEP = 2  # pixels between neighbouring places that are tried
THRESHOLD = 0.25  # a share of the error at an empty place; a sprite mixed half and half with the background reaches it


class ToyChecker:
    """Finds near objects in an image of any canvas, and says whether they are what a prompt asked for."""

    def __init__(self, world: ToyWorld):
        self.world = world

    def detect(self, pixel_values: Tensor) -> list[tuple[int, tuple[int, int]]]:
        """(object, (x, y) of its top left corner) for everything in an image (3, H, W) in [-1, 1], best match first.

        Raises ValueError for an image that does not have the size of one of the toy world's canvases.
        """
        if pixel_values.ndim != 3 or len(pixel_values) != 3:
            raise ValueError(f"An image of the toy world is (3, H, W), got {tuple(pixel_values.shape)}.")
        canvas = tuple(pixel_values.shape[1:])
        check_canvas(canvas)
        size = sprite_size(canvas)
        colors, alpha = self.world.sprites_of_size[size].permute(0, 3, 1, 2).split([3, 1], dim=1)
        colors, alpha = (
            colors.flatten(1),
            alpha.flatten(1).repeat(1, 3),
        )  # (V, 3 * size * size), as unfold orders pixels
        pixels = (pixel_values.float().clamp(-1, 1) + 1) / 2
        background = _border(pixels).median(dim=1).values  # (3,)
        empty = background.repeat_interleave(size**2)
        sprites = empty * (1 - alpha) + colors  # (V, 3 * size * size)
        windows = torch.nn.functional.unfold(pixels[None], size, stride=STEP)[0].T  # (places, 3 * size * size)
        errors = torch.cdist(windows, sprites) ** 2  # (places, V)
        errors = errors / ((sprites - empty) ** 2).sum(dim=1)  # 1 where there is nothing
        return self._pick(errors, size, columns=(canvas[1] - size) // STEP + 1)

    def _pick(self, errors: Tensor, size: int, columns: int) -> list[tuple[int, tuple[int, int]]]:
        """The best match, then the best that does not overlap it, and so on."""
        places = torch.arange(len(errors))
        x, y = places % columns * STEP, places // columns * STEP
        found, best = [], errors.min(dim=1)
        remaining = best.values.clone()
        while remaining.min() < THRESHOLD:
            place = remaining.argmin()
            found.append((int(best.indices[place]), (int(x[place]), int(y[place]))))
            overlaps = ((x - x[place]).abs() < 0.7 * size) & ((y - y[place]).abs() < 0.7 * size)
            remaining[overlaps] = 1.0
        return found

    def check(self, pixel_values: Tensor, prompt: Prompt) -> bool:
        """Whether the image has exactly the prompt's objects, in the right places if the prompt names any."""
        found = self.detect(pixel_values)
        if sorted(index for index, _ in found) != sorted(prompt.objects):
            return False
        if prompt.relation is None:
            return True
        first, second = (dict(found)[index] for index in prompt.objects)  # in reading order
        axis = 0 if prompt.relation in ("left of", "right of") else 1
        return second[axis] - first[axis] > SPRITE // 8


def _border(pixels: Tensor) -> Tensor:
    """The outermost pixels of (3, H, W), as (3, n)."""
    return torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1)
