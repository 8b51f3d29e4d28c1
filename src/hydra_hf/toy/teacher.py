"""The toy world's stand-in for the pretrained ViT that HYDRA-TOK is distilled from."""

import torch
from torch import Tensor, nn

from hydra_hf.modeling.grid import image_grid, patchify, sinusoidal_positions_2d
from hydra_hf.toy.world import BACKGROUNDS, FAR, NEAR, SPRITE, Scenes, ToyWorld


class ToyTeacher(nn.Module):
    """Knows every patch of the toy world at difficulty 1 and says what it is part of, how far and where.

    A state holds half its channels for the words of the object's name, a sixth for its distance and a third for the place
    of the patch. A patch of no scene (of a depth map, say) has the place alone.
    """

    def __init__(self, hidden_size: int = 192, patch_size: int = 16):
        super().__init__()
        world = ToyWorld(difficulty=1)
        self.patch_size = patch_size
        self.widths = (hidden_size // 2, hidden_size // 6, hidden_size // 3)
        generator = torch.Generator().manual_seed(0)
        words = sorted({word for name in world.names for word in name.split()})
        word_codes = dict(zip(words, _directions(len(words), self.widths[0], generator)))
        name_codes = torch.stack([sum(word_codes[word] for word in name.split()) for name in world.names])
        distance_codes = 0.7 * _directions(2, self.widths[1], generator)
        scenes = _every_object(world)
        codes = [nn.functional.normalize(name_codes[scenes.objects[:, 0]], dim=-1),
                 distance_codes[(scenes.distances[:, 0] == FAR).long()]]  # fmt: skip
        corner = world.render(scenes)[:, :, :SPRITE, :SPRITE]
        patches = patchify(corner, patch_size)  # (V, 4, 3 p p)
        codes = torch.cat(codes, -1).repeat_interleave(patches.shape[1], 0)
        patches = patches.flatten(0, 1)
        is_object = patches.unflatten(1, (3, -1)).std(-1).amax(-1) > 1e-3  # an empty corner is background alone
        self.register_buffer("patches", patches[is_object], persistent=False)
        self.register_buffer("codes", codes[is_object], persistent=False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """States (B, N, D) of pixels (B, 3, H, W) in [-1, 1], the same for all of `layers`."""
        patches = patchify(pixel_values, self.patch_size)
        distance, nearest = torch.cdist(patches.flatten(0, 1), self.patches).min(-1)
        distance, nearest = distance.unflatten(0, patches.shape[:2]), nearest.unflatten(0, patches.shape[:2])  # (B, N)
        is_known = distance < 0.5
        codes = torch.where(is_known[..., None], self.codes[nearest], 0)
        grid = image_grid(*pixel_values.shape[-2:], self.patch_size)
        positions = sinusoidal_positions_2d([grid], self.widths[2], codes, max_period=16)
        positions = nn.functional.normalize(positions - positions.mean(0), dim=-1).expand(len(codes), -1, -1)
        return [torch.cat([codes, positions], dim=-1)] * len(layers)


def _directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    return nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


def _every_object(world: ToyWorld) -> Scenes:
    """One scene for each object, distance and background, the object in the top left corner."""
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
        sizes=torch.full((count, 4), SPRITE),
        backgrounds=backgrounds,
    )
