"""Packed images of one size against a dense call of the same modules, and of several sizes against each image alone."""

import torch
from common import DTYPES, medians, parser, report
from models import hydra_config, random_model, size_name, tiny_config
from torch import Tensor

from hydra_hf.modeling.grid import latents_to_tokens, num_tokens, pack_images


NUM_IMAGES = 2
BAR = 0.97  # of the dense call's speed


def steps_of(model, images: list[Tensor]) -> dict[str, tuple]:
    """Part -> (what is measured, its baseline), both on all images."""
    tower, patch_size, head = model.model.vision_tower, model.config.vision_config.patch_size, model.vision_head
    pixel_values, image_grid_thw = pack_images(images, patch_size)
    grids = [tuple(grid) for grid in image_grid_thw.tolist()]
    tokens = model.encode_images(pixel_values, image_grid_thw)
    states = torch.randn(len(tokens), model.config.text_config.hidden_size).to(tokens.dtype)
    sigma = torch.full((len(images),), 0.5, dtype=tokens.dtype)
    if len(set(grids)) == 1:
        groups = [(list(range(len(grids))), grids[0])]
    else:
        groups = [([index], grid) for index, grid in enumerate(grids)]
    parts = [tensor.split([num_tokens(grid) for grid in grids]) for tensor in (tokens, states)]
    rows = [[torch.stack([part[i] for i in members]) for part in parts] for members, _ in groups]
    pixels = [torch.stack([images[i] for i in members]) for members, _ in groups]

    def encode() -> list[Tensor]:
        return [latents_to_tokens(tower.encode(batch).latent_dist.mode()) for batch in pixels]

    def embed() -> list[Tensor]:
        return [
            model.model._embed_rows(latents, sigma[members], grids=[grid])
            for (latents, _), (members, grid) in zip(rows, groups)
        ]

    def velocity() -> list[Tensor]:
        return [
            head(hidden_states, latents, sigma[members], [grid])
            for (latents, hidden_states), (members, grid) in zip(rows, groups)
        ]

    return {
        "encode": (lambda: model.encode_images(pixel_values, image_grid_thw), encode),
        "embed": (lambda: model.model.get_image_embeds(tokens, sigma, grids), embed),
        "velocity": (lambda: model._predict_velocity(states, tokens, sigma, grids), velocity),
    }


def measure(model, name: str, images: list[Tensor], arguments) -> list[dict]:
    rows = []
    for part, (packed, baseline) in steps_of(model, images).items():
        difference = (packed() - torch.cat([rows.flatten(0, 1) for rows in baseline()])).abs().max().item()
        assert arguments.dtype != "fp32" or difference < 1e-4, f"{part} of {name} differs by {difference}"
        seconds = medians({"baseline": baseline, "packed": packed}, arguments.runs)
        ratio = seconds["baseline"] / seconds["packed"]
        rows.append(
            {"images": name, "part": part, **seconds, "ratio": ratio, "bar": BAR, "max difference": difference}
        )
    return rows


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    arguments = parser(__doc__, layers=7, runs=5).parse_args(arguments)
    torch.set_num_threads(arguments.threads)
    config = tiny_config() if arguments.tiny else hydra_config("1.5B", arguments.layers)
    model, dtype = random_model(config, DTYPES[arguments.dtype]), DTYPES[arguments.dtype]
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    sizes = {
        "one size": [(side, side)] * NUM_IMAGES,
        "two sizes": [(side, side), (side // 2 // patch * patch, side)],
    }
    rows = []
    for name, shapes in sizes.items():
        images = [(2 * torch.rand(3, *shape) - 1).to(dtype) for shape in shapes]
        rows += measure(model, name, images, arguments)
    report(f"Seconds of images packed, {size_name('1.5B', arguments)}", rows, arguments)


if __name__ == "__main__":
    main()
