"""The toy world: scenes of 1 to 4 objects with exact truth.

Objects are Fluent emoji and coloured shapes on whole patches of 16 px, in layouts with few modes, so that a small model can
learn the world. They are 32 px large where both sides of the canvas have room for two, 16 px elsewhere. Difficulty 1 has 24
emoji on flat backgrounds, 2 has 48 emoji and graded backgrounds, 3 moves objects off the grid and makes far ones smaller.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


ASSETS = Path(__file__).parents[1] / "assets" / "sprites"
PATCH, SPRITE, TILE = 16, 32, 64  # pixels: a patch, an object, a tile of the atlas
CANVAS = (64, 64)  # default height and width of an image
SIDES = range(48, 129, PATCH)
CANVASES = (CANVAS, *((h, w) for h in SIDES for w in SIDES if max(h, w) <= 2 * min(h, w) and (h, w) != CANVAS))
SHAPES = ("circle", "square", "triangle", "diamond")
COLORS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230), "yellow": (235, 205, 40),
    "purple": (150, 50, 200), "orange": (240, 140, 30),
}  # fmt: skip
BACKGROUNDS = {"white": (245, 245, 245), "grey": (150, 150, 150), "black": (25, 25, 25), "sky": (190, 220, 250)}
LAYOUTS = {
    "centre": ((1, 1),),
    "row": ((0, 1), (2, 1)),
    "three": ((0, 0), (2, 0), (1, 2)),
    "four": ((0, 0), (2, 0), (0, 2), (2, 2)),
    "column": ((1, 0), (1, 2)),
}  # top left corners (x, y) in halves of the room that an object leaves, in reading order
Placed = tuple[int, tuple[int, int]]  # an object, and (x, y) of its top left corner in pixels
NEAR, FAR = 1.0, 2.0
HAZE = 0.5  # share of the background in the colour of a far object
MAX_OBJECTS = 4
NUM_PLACES = torch.tensor([len(layout) for layout in LAYOUTS.values()])
PLACES = torch.tensor([[*layout, *[(0, 0)] * (MAX_OBJECTS - len(layout))] for layout in LAYOUTS.values()])  # (5, 4, 2)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes on one canvas; objects in reading order, -1 where there is none."""

    objects: Tensor  # (B, 4) index into `ToyWorld.names`
    positions: Tensor  # (B, 4, 2) top left corner (x, y) in pixels
    distances: Tensor  # (B, 4) NEAR or FAR
    sizes: Tensor  # (B, 4) pixels
    backgrounds: Tensor  # (B,)
    canvas: tuple[int, int] = CANVAS  # height and width in pixels

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index) -> "Scenes":
        return Scenes(*(tensor[index] for tensor in self._tensors()), canvas=self.canvas)

    def where(self, mask: Tensor, others: "Scenes") -> "Scenes":
        """These scenes where `mask` (B,) is true, the others elsewhere."""
        pairs = zip(self._tensors(), others._tensors())
        chosen = (torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs)
        return Scenes(*chosen, canvas=self.canvas)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.objects, self.positions, self.distances, self.sizes, self.backgrounds)


def sprite_size(canvas: tuple[int, int]) -> int:
    """Side of an object in pixels."""
    return SPRITE if min(canvas) >= 2 * SPRITE else SPRITE // 2


def places_on(canvas: tuple[int, int]) -> Tensor:
    """The corners of all layouts in pixels (5, 4, 2), on whole patches of a canvas."""
    room = torch.tensor([canvas[1], canvas[0]]) - sprite_size(canvas)
    return PLACES * room // (2 * PATCH) * PATCH


def columns_and_rows(canvas: tuple[int, int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The x of the first, middle and last column of `places_on` a canvas, and the y of its rows, in pixels."""
    rooms = (side - sprite_size(canvas) for side in reversed(canvas))
    return tuple((0, room // (2 * PATCH) * PATCH, room) for room in rooms)


def place_objects(placed: list[Iterable[Placed]], backgrounds: list[int], canvas: tuple[int, int]) -> Scenes:
    """Scenes of near objects at these places, which do not overlap."""
    objects, positions = torch.full((len(placed), MAX_OBJECTS), -1), torch.zeros(len(placed), MAX_OBJECTS, 2).long()
    for row, scene in enumerate(placed):
        for slot, (index, place) in enumerate(sorted(scene, key=lambda one: one[1][::-1])):
            objects[row, slot], positions[row, slot] = index, torch.tensor(place)
    distances, sizes = torch.full(objects.shape, NEAR), torch.full_like(objects, sprite_size(canvas))
    return Scenes(objects, positions, distances, sizes, torch.tensor(backgrounds), canvas)


def canvas_of(items: Iterable) -> tuple[int, int]:
    """The one canvas of clips or edits. Raises ValueError if they have several."""
    canvases = {item.canvas for item in items}
    if len(canvases) != 1:
        raise ValueError(f"A batch of canvases {sorted(canvases)}, expected exactly one.")
    return canvases.pop()


def check_canvas(canvas: tuple[int, int]) -> None:
    """Raises ValueError for a size that is not one of `CANVASES`."""
    if canvas not in CANVASES:
        raise ValueError(
            f"{canvas=} must be (height, width) of {SIDES[0]} to {SIDES[-1]} px in steps of {PATCH}, 1:2 to 2:1."
        )


def is_held_out(key: str, share: int = 10) -> bool:
    """Whether a key belongs to the test split: one in `share`, by a hash that never changes."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % share == 0


class ToyWorld:
    """A world of one difficulty. Everything random comes from the generator of the caller.

    Held out for test, by hash: pairs of objects, (object, count), and (object, background, distance) of single objects.
    """

    def __init__(self, difficulty: int = 1):
        if difficulty not in (1, 2, 3):
            raise ValueError(f"{difficulty=} must be 1, 2 or 3.")
        self.difficulty = difficulty
        self.num_emoji = 24 if difficulty == 1 else 48
        self.num_backgrounds = len(BACKGROUNDS) * (1 if difficulty == 1 else 2)
        self.emoji_names = tuple(json.loads((ASSETS / "names.json").read_text()))[: self.num_emoji]
        self.shape_names = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
        self.names = self.emoji_names + self.shape_names
        self.sprites = torch.cat([_load_emoji(self.num_emoji), _draw_shapes()])  # (V, 4, 32, 32), premultiplied
        self.sprites_of_size = {
            size: self._resized(size) for near in (SPRITE, SPRITE // 2) for size in (near, _far(near))
        }
        count = len(self.names)
        self.test_pairs = torch.zeros(count, count, dtype=torch.bool)
        for i in range(count):
            for j in range(i):
                pair = "+".join(sorted((self.names[i], self.names[j])))
                self.test_pairs[i, j] = self.test_pairs[j, i] = is_held_out(pair)
        self.test_counts = torch.tensor(
            [[n > 1 and is_held_out(f"{n} {name}") for n in range(MAX_OBJECTS + 1)] for name in self.names]
        )

    def _resized(self, size: int) -> Tensor:
        """The sprites (V, size, size, 4)."""
        mode = {"mode": "bilinear", "antialias": True} if SPRITE % size else {"mode": "area"}
        return torch.nn.functional.interpolate(self.sprites, size=(size, size), **mode).permute(0, 2, 3, 1)

    # Scenes

    def sample_scenes(
        self, num_scenes: int, generator: torch.Generator, *, split: str = "train", max_objects: int = MAX_OBJECTS,
        scattered: float = 0.0, canvas: tuple[int, int] = CANVAS,
    ) -> Scenes:  # fmt: skip
        """Scenes of one split, with 1 to `max_objects` objects, near and far, some of them alike; see `arrange`."""
        check_split(split)
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise ValueError(f"{max_objects=} must be between 1 and {MAX_OBJECTS}.")
        check_canvas(canvas)
        proposal = (num_scenes, max_objects, scattered, canvas, generator)
        scenes = self._propose_scenes(*proposal)
        while (wrong := self.is_test(scenes) != (split == "test")).any():
            scenes = self._propose_scenes(*proposal).where(wrong, scenes)
        return scenes

    def _propose_scenes(
        self, num_scenes: int, max_objects: int, scattered: float, canvas: tuple[int, int], generator: torch.Generator
    ) -> Scenes:
        counts = torch.randint(1, max_objects + 1, (num_scenes,), generator=generator)
        objects = torch.randint(len(self.names), (num_scenes, MAX_OBJECTS), generator=generator)
        again = torch.rand(num_scenes, MAX_OBJECTS, generator=generator) < 0.35  # the same as the previous object
        for slot in range(1, MAX_OBJECTS):
            objects[:, slot] = torch.where(again[:, slot], objects[:, slot - 1], objects[:, slot])
        objects[torch.arange(MAX_OBJECTS) >= counts[:, None]] = -1
        is_column = torch.rand(num_scenes, generator=generator) < 0.5
        distances = torch.where(torch.rand(num_scenes, MAX_OBJECTS, generator=generator) < 0.5, NEAR, FAR)
        return self.arrange(objects, is_column, distances, generator, scattered, canvas)

    def arrange(
        self,
        objects: Tensor,
        is_column: Tensor,
        distances: Tensor,
        generator: torch.Generator,
        scattered: float = 0.0,
        canvas: tuple[int, int] = CANVAS,
    ) -> Scenes:
        """Objects (B, 4) in the layout for their number, on random backgrounds; two are in a row or a column.

        A share `scattered` of the scenes leaves places of a larger layout empty: a single cat may be at the bottom right.
        """
        counts, places, size = (objects >= 0).sum(1), places_on(canvas), sprite_size(canvas)
        positions = places[torch.where((counts == 2) & is_column, 4, counts - 1)]
        if scattered:
            is_scattered = torch.rand(len(objects), generator=generator) < scattered
            positions = torch.where(is_scattered[:, None, None], self._scatter(counts, places, generator), positions)
        sizes = torch.full_like(objects, size)
        if self.difficulty == 3:
            positions = positions + 2 * torch.randint(-2, 3, positions.shape, generator=generator)
            positions = positions.clamp(min=0).minimum(torch.tensor([canvas[1], canvas[0]]) - size)
            sizes = torch.where(distances == FAR, _far(size), size)
        backgrounds = torch.randint(self.num_backgrounds, (len(objects),), generator=generator)
        return Scenes(objects, positions, distances, sizes, backgrounds, canvas)

    def _scatter(self, counts: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
        """Positions (B, 4, 2): random places, in reading order, of a random layout with enough places."""
        layouts = torch.multinomial((counts[:, None] <= NUM_PLACES).float(), 1, generator=generator)  # (B, 1)
        slots = torch.arange(MAX_OBJECTS)
        order = torch.rand(len(counts), MAX_OBJECTS, generator=generator)
        order = order.masked_fill(slots >= NUM_PLACES[layouts], 2).argsort(1)
        chosen = order.masked_fill(slots >= counts[:, None], MAX_OBJECTS - 1).sort(1).values
        return places[layouts, chosen]

    def is_test(self, scenes: Scenes) -> Tensor:
        """(B,) whether a scene belongs to the test split."""
        objects = scenes.objects
        counts = (objects >= 0).sum(1)
        first = objects[:, 0]
        same = ((objects == first[:, None]) | (objects < 0)).all(1)
        present = objects >= 0
        pairs = self.test_pairs[objects[:, :, None], objects[:, None, :]] & present[:, :, None] & present[:, None, :]
        keys = zip(first.tolist(), scenes.backgrounds.tolist(), scenes.distances[:, 0].tolist(), counts.tolist())
        single = torch.tensor([n == 1 and is_held_out(f"{self.names[o]} {b} {d}") for o, b, d, n in keys])
        return torch.where(counts == 1, single, pairs.flatten(1).any(1) | (same & self.test_counts[first, counts]))

    # Images

    def render(self, scenes: Scenes, background: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1]; a far object is blended half and half with the background.

        Args:
            background: (B, 3, H, W) in [0, 1], instead of the backgrounds of the scenes; see `color_fields`.
        """
        background = self._background(scenes) if background is None else background
        canvas = background.clone()
        for _, place, sprites, distances in self._placed(scenes):
            haze = torch.where(distances == FAR, HAZE, 0.0)[:, None, None, None]
            color, alpha = sprites[..., :3], sprites[..., 3:]
            canvas[place] = canvas[place] * (1 - alpha) + color * (1 - haze) + background[place] * alpha * haze
        return canvas * 2 - 1

    def render_depth(self, scenes: Scenes) -> Tensor:
        """Depth maps as nearness (B, 3, H, W): -1 background, 0 far, 1 near."""
        depth = torch.full((len(scenes), 1, *scenes.canvas), -1.0)
        for _, place, sprites, distances in self._placed(scenes):
            nearness = torch.where(distances == FAR, 0.0, 1.0)[:, None, None, None]
            depth[place] = torch.where(sprites[..., 3:] > 0.5, nearness, depth[place])
        return depth.expand(-1, 3, -1, -1)

    def render_segmentation(self, scenes: Scenes) -> Tensor:
        """Boundaries of the objects (B, 3, H, W), white (1) on black (-1), as in UniMRG."""
        labels = torch.zeros(len(scenes), 1, *scenes.canvas)
        for slot, place, sprites, _ in self._placed(scenes):
            labels[place] = torch.where(sprites[..., 3:] > 0.5, float(slot + 1), labels[place])
        padded = torch.nn.functional.pad(labels, (1, 1, 1, 1), mode="replicate")
        high = torch.nn.functional.max_pool2d(padded, 3, stride=1)
        low = -torch.nn.functional.max_pool2d(-padded, 3, stride=1)
        boundary = (high != low) & (labels > 0)
        return torch.where(boundary, 1.0, -1.0).expand(-1, 3, -1, -1)

    def object_masks(self, scenes: Scenes) -> Tensor:
        """Where each object is visible, (B, 4, H, W) bool."""
        masks = torch.zeros(len(scenes), MAX_OBJECTS, *scenes.canvas, dtype=torch.bool)
        for slot, (rows, _, y, x), sprites, _ in self._placed(scenes):
            masks[rows, slot, y, x] = sprites[..., 3] > 0.5
        for slot in range(MAX_OBJECTS - 1):  # later ones cover it
            masks[:, slot] &= ~masks[:, slot + 1 :].any(dim=1)
        return masks

    def _background(self, scenes: Scenes) -> Tensor:
        colors = torch.tensor(list(BACKGROUNDS.values())) / 255
        flat = colors[scenes.backgrounds % len(colors)][:, :, None, None].expand(-1, -1, *scenes.canvas)
        is_graded = (scenes.backgrounds >= len(colors))[:, None, None, None]
        shade = torch.linspace(1, 0.7, scenes.canvas[0])[:, None]
        return torch.where(is_graded, flat * shade, flat)

    def _placed(self, scenes: Scenes):
        """Yields, by slot and size: the slot, an index into the canvas, the sprites (n, size, size, 4) there, their distances."""
        for slot in range(MAX_OBJECTS):
            objects, sizes = scenes.objects[:, slot], scenes.sizes[:, slot]
            for size, sprites in self.sprites_of_size.items():
                rows = ((objects >= 0) & (sizes == size)).nonzero()[:, 0]
                if not len(rows):
                    continue
                x, y = (scenes.positions[rows, slot, :, None] + torch.arange(size)).unbind(1)  # (n, size) each
                place = (rows[:, None, None], slice(None), y[:, :, None], x[:, None, :])
                yield slot, place, sprites[objects[rows]], scenes.distances[rows, slot]


def _far(size: int) -> int:
    """Side of a distant object in pixels, at difficulty 3."""
    return size * 3 // 4


def color_fields(number: int, canvas: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Backgrounds that no words tell, (number, 3, H, W) in [0, 1]: random colours at 1, 2 x 2 or 4 x 4 places, and what is between them."""
    sides = torch.randint(3, (number,), generator=generator)
    fields = torch.empty(number, 3, *canvas)
    for choice, side in enumerate((1, 2, 4)):
        rows = sides == choice
        colors = torch.rand(int(rows.sum()), 3, side, side, generator=generator)
        fields[rows] = torch.nn.functional.interpolate(colors, size=canvas, mode="bilinear")
    return fields


def check_split(split: str) -> None:
    """Raises ValueError for a name other than train or test."""
    if split not in ("train", "test"):
        raise ValueError(f"{split=} must be 'train' or 'test'.")


def _premultiplied(pictures: list[Image.Image]) -> Tensor:
    """RGBA images as (V, 4, 32, 32) in [0, 1]; resized after multiplying by alpha, so that hidden colours do not bleed."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    rgba = torch.from_numpy(pixels).float().permute(0, 3, 1, 2) / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    return torch.nn.functional.interpolate(rgba, size=(SPRITE, SPRITE), mode="area")


def _load_emoji(count: int) -> Tensor:
    atlas = Image.open(ASSETS / "emoji.png").convert("RGBA")
    columns = atlas.width // TILE
    corners = [(index % columns * TILE, index // columns * TILE) for index in range(count)]
    return _premultiplied([atlas.crop((x, y, x + TILE, y + TILE)) for x, y in corners])


def _draw_shapes() -> Tensor:
    size, margin = SPRITE * 4, 8
    high, middle = size - margin, size // 2
    pictures = []
    for shape in SHAPES:
        for color in COLORS.values():
            picture = Image.new("RGBA", (size, size), (*color, 0))
            pen = ImageDraw.Draw(picture)
            if shape == "circle":
                pen.ellipse((margin, margin, high, high), fill=(*color, 255))
            elif shape == "square":
                pen.rectangle((margin + 6, margin + 6, high - 6, high - 6), fill=(*color, 255))
            elif shape == "triangle":
                pen.polygon([(middle, margin), (high, high), (margin, high)], fill=(*color, 255))
            else:
                pen.polygon([(middle, margin), (high, middle), (middle, high), (margin, middle)], fill=(*color, 255))
            pictures.append(picture)
    return _premultiplied(pictures)
