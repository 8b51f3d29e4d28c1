"""The toy world's stand-in for the pretrained ViT that HYDRA-TOK is distilled from."""

import torch
from torch import Tensor, nn

from hydra_hf.modeling import HydraTokConfig
from hydra_hf.modeling.grid import patchify
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
        known_patches, known_codes = [], []
        for size in (SPRITE, SPRITE // 2):
            scenes = _every_object(world, size)
            codes = [nn.functional.normalize(name_codes[scenes.objects[:, 0]], dim=-1),
                     distance_codes[(scenes.distances[:, 0] == FAR).long()]]  # fmt: skip
            patches = patchify(world.render(scenes)[:, :, :size, :size], patch_size)  # (V, 4 or 1, 3 p p)
            codes = torch.cat(codes, -1).repeat_interleave(patches.shape[1], 0)
            patches = patches.flatten(0, 1)
            is_object = patches.unflatten(1, (3, -1)).std(-1).amax(-1) > 1e-3  # an empty corner is only background
            known_patches.append(patches[is_object])
            known_codes.append(codes[is_object])
        self.register_buffer("patches", torch.cat(known_patches), persistent=False)
        self.register_buffer("codes", torch.cat(known_codes), persistent=False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """States (B, N, D) of normalised pixels (B, 3, H, W), the same for all of `layers`."""
        mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        patches = patchify(2 * (pixel_values * std + mean) - 1, self.patch_size)
        distance, nearest = torch.cdist(patches.flatten(0, 1), self.patches).min(-1)
        distance, nearest = distance.unflatten(0, patches.shape[:2]), nearest.unflatten(0, patches.shape[:2])  # (B, N)
        is_known = distance < 0.5
        codes = torch.where(is_known[..., None], self.codes[nearest], 0)
        grid = (pixel_values.shape[-2] // self.patch_size, pixel_values.shape[-1] // self.patch_size)
        places = place_codes(grid, self.widths[2]).to(codes).expand(len(codes), -1, -1)
        return [torch.cat([codes, places], dim=-1)] * len(layers)


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
