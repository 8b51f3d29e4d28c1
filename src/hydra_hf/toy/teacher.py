"""The toy world's stand-ins for the pretrained ViT that HYDRA-TOK is distilled from, and for HYDRA-XTok's video teacher."""

import torch
from torch import Tensor, nn

from hydra_hf.modeling import HydraTokConfig
from hydra_hf.modeling.grid import Grid, patchify
from hydra_hf.toy.clips import DIRECTIONS, GROUP
from hydra_hf.toy.world import BACKGROUNDS, FAR, NEAR, SPRITE, Scenes, ToyWorld


class ToyTeacher(nn.Module):
    """Knows every patch of the toy world at difficulty 1: which object it is part of, at what distance, and where.

    Half the channels of a state encode the words of the object's name, a sixth its distance, and a third the place of the
    patch, as a share of the image. A patch that belongs to no scene (of a depth map, say) has only its place.

    Args:
        image_mean, image_std: statistics of the pixels that it gets; None is those of the presets.
    """

    def __init__(
        self,
        hidden_size: int = 192,
        patch_size: int = 16,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
    ):
        super().__init__()
        config = HydraTokConfig()
        self.image_mean, self.image_std = image_mean or config.image_mean, image_std or config.image_std
        world = ToyWorld(difficulty=1)
        self.patch_size = patch_size
        self.widths = (hidden_size // 2, hidden_size // 6, hidden_size // 3)
        generator = torch.Generator().manual_seed(0)
        words = sorted({word for name in world.names for word in name.split()})
        word_codes = dict(zip(words, _directions(len(words), self.widths[0], generator)))
        name_codes = torch.stack([sum(word_codes[word] for word in name.split()) for name in world.names])
        distance_codes = 0.7 * _directions(2, self.widths[1], generator)
        known_patches, known_codes, known_objects = [], [], []
        for size in (SPRITE, SPRITE // 2):
            scenes = _every_object(world, size)
            codes = [nn.functional.normalize(name_codes[scenes.objects[:, 0]], dim=-1),
                     distance_codes[(scenes.distances[:, 0] == FAR).long()]]  # fmt: skip
            patches = patchify(world.render(scenes)[:, :, :size, :size], patch_size)  # (V, 4 or 1, 3 p p)
            codes = torch.cat(codes, -1).repeat_interleave(patches.shape[1], 0)
            objects = scenes.objects[:, 0].repeat_interleave(patches.shape[1], 0)
            patches = patches.flatten(0, 1)
            is_object = patches.unflatten(1, (3, -1)).std(-1).amax(-1) > 1e-3  # an empty corner is only background
            known_patches.append(patches[is_object])
            known_codes.append(codes[is_object])
            known_objects.append(objects[is_object])
        self.register_buffer("patches", torch.cat(known_patches), persistent=False)
        self.register_buffer("codes", torch.cat(known_codes), persistent=False)
        self.register_buffer("objects", torch.cat(known_objects), persistent=False)

    def find(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Of each patch of images (B, 3, H, W) in [-1, 1], the number of the known patch that is like it, and whether there is
        one; both (B, N)."""
        patches = patchify(pixel_values, self.patch_size)
        distance, nearest = torch.cdist(patches.flatten(0, 1), self.patches).min(-1)
        return nearest.unflatten(0, patches.shape[:2]), distance.unflatten(0, patches.shape[:2]) < 0.5

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """States (B, N, D) of normalised pixels (B, 3, H, W), the same for all of `layers`, and without layers for the output."""
        mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        nearest, is_known = self.find(2 * (pixel_values * std + mean) - 1)
        codes = torch.where(is_known[..., None], self.codes[nearest], 0)
        return [torch.cat([codes, self.places(pixel_values)], dim=-1)] * max(1, len(layers))

    def places(self, pixel_values: Tensor) -> Tensor:
        """The codes of places (B, N, D / 3) in images (B, 3, H, W)."""
        grid = (pixel_values.shape[-2] // self.patch_size, pixel_values.shape[-1] // self.patch_size)
        return place_codes(grid, self.widths[2]).to(pixel_values).expand(len(pixel_values), -1, -1)


class ToyVideoTeacher(nn.Module):
    """Knows every patch of every fourth frame of a clip: which object it is part of, which way that object has come, and where.

    Half the channels of a state encode the words of the object's name, as `ToyTeacher` does, a sixth the direction, or that it
    rests, and a third the place. A patch that belongs to no object has only its place.
    """

    def __init__(self, hidden_size: int = 192):
        super().__init__()
        self.images = ToyTeacher(hidden_size)
        codes = 0.7 * _directions(1 + len(DIRECTIONS), self.images.widths[1], torch.Generator().manual_seed(1))
        self.register_buffer("motion_codes", codes, persistent=False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Grid]:
        """States (B, N, D) of clips (B, 3, 1 + 4n, H, W) in [-1, 1] for every fourth frame after the first, and their grid."""
        frames = pixel_values[:, :, ::GROUP].transpose(1, 2)  # (B, 1 + n, 3, H, W), all objects on whole patches
        images, patch = frames.flatten(0, 1), self.images.patch_size
        height, width = images.shape[-2] // patch, images.shape[-1] // patch
        nearest, is_known = (
            found.unflatten(0, frames.shape[:2]) for found in self.images.find(images)
        )  # (B, 1 + n, N)
        objects = torch.where(is_known, self.images.objects[nearest], -1)
        names = self.images.codes[nearest[:, 1:], : self.images.widths[0]]
        motions = self.motion_codes[_motions(objects, width)]
        codes = torch.where(is_known[:, 1:, :, None], torch.cat([names, motions], dim=-1), 0)
        places = self.images.places(images).unflatten(0, frames.shape[:2])[:, 1:]
        return torch.cat([codes, places], dim=-1).flatten(1, 2), (frames.shape[1] - 1, height, width)


def _motions(objects: Tensor, width: int) -> Tensor:
    """Which way the object of each patch has come, for objects (B, 1 + n, N) on a grid of this width, -1 where there is none:
    0 for not at all, or 1 + the number of one of `DIRECTIONS`; (B, n, N)."""
    is_same = objects[..., :, None] == objects[..., None, :]  # (B, 1 + n, N, N)
    places = torch.arange(objects.shape[-1], device=objects.device)
    places = torch.stack([places % width, places // width], dim=-1).float()  # x and y
    now = is_same[:, 1:].float()
    before = (objects[:, 1:, :, None] == objects[:, :-1, None, :]).float()
    centres = [mask @ places / mask.sum(-1, keepdim=True).clamp(min=1) for mask in (now, before)]
    moved = torch.where(before.sum(-1, keepdim=True) > 0, centres[0] - centres[1], 0)  # (B, n, N, 2)
    axis = moved.abs().argmax(-1, keepdim=True)
    along = moved.gather(-1, axis)[..., 0]
    direction = 1 + 2 * axis[..., 0] + (along > 0).long()  # left, right, up, down
    return torch.where(along.abs() > 0.5, direction, 0)


def place_codes(grid: tuple[int, int], width: int) -> Tensor:
    """Directions (N, width) that encode where each token of a (h, w) grid is, as a share of the image."""
    frequencies = 16 ** -(torch.arange(width // 4) / (width // 4))
    row, column = (4 * (torch.arange(size) + 0.5) / size for size in grid)
    row, column = row.repeat_interleave(grid[1]), column.repeat(grid[0])
    codes = torch.cat([f(at[:, None] * frequencies) for at in (row, column) for f in (torch.sin, torch.cos)], dim=-1)
    return nn.functional.normalize(codes - codes.mean(0), dim=-1)


def _directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    return nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


def _every_object(world: ToyWorld, size: int) -> Scenes:
    """One scene for each object, distance and background, with the object, `size` pixels large, in the top left corner."""
    objects, distances, backgrounds = torch.cartesian_prod(
        torch.arange(len(world.names)), torch.tensor([NEAR, FAR]).long(), torch.arange(len(BACKGROUNDS))
    ).unbind(1)
    count = len(objects)
    slots = torch.full((count, 4), -1)
    slots[:, 0] = objects
    return Scenes(
        objects=slots,
        positions=torch.zeros(count, 4, 2, dtype=torch.long),
        distances=distances.float()[:, None].expand(-1, 4),
        sizes=torch.full((count, 4), size),
        backgrounds=backgrounds,
    )
