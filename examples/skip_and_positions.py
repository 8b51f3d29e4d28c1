"""What two choices of the presets contribute to learning: the vision head reads the noisy latents, Sem-ViT has positions.

python examples/skip_and_positions.py --out skip_and_positions.json

Each of the four pairs is trained for a few steps on text to image in the toy world, from three seeds, under the conditions
of stage I (a new language model, frozen) and of stage II (all but the encoder trained). The vision tower is the embedded
checkpoint's. It prints the flow loss on held-out prompts at four noise levels; the first row is that of predicting no velocity.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

import hydra_hf
from hydra_hf import HydraForConditionalGeneration, HydraTokModel
from hydra_hf.data.collate import collate
from hydra_hf.modeling.flow import add_noise, velocity_target
from hydra_hf.modeling.grid import image_grids, per_token
from hydra_hf.toy.batches import ToyData
from hydra_hf.toy.language import ToyLanguage
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.hydra_trainer import train_hydra
from hydra_hf.training.recipe import HydraRecipe, HydraStage
from hydra_hf.training.recipes import tiny


SIGMAS = (0.2, 0.5, 0.8, 0.97)
STAGE1 = {
    "vision_head": 1e-3, "model.multi_modal_projector": 1e-3, "model.time_embedding": 1e-3,
    "model.vision_tower.sem_vit": 3e-4,
}  # fmt: skip
RATES = {"stage1": STAGE1, "stage2": {**STAGE1, "model.language_model": 1e-3}}


def make_tower(use_sem_positions: bool) -> HydraTokModel:
    """The embedded checkpoint's vision tower, with positions at their initial value, zero, or without them."""
    embedded = HydraTokModel.from_pretrained(hydra_hf.TINY, subfolder="model")
    embedded.config.use_sem_positions = use_sem_positions
    tower = HydraTokModel(embedded.config)
    tower.load_state_dict(embedded.state_dict(), strict=False)
    if use_sem_positions:
        for parameter in tower.sem_vit.position_proj.parameters():
            parameter.data.zero_()
    return tower


def recipe_of(tower: Path, stage: str, use_latent_skip: bool, num_steps: int, seed: int) -> HydraRecipe:
    recipe = tiny.hydra(str(tower))
    config = recipe.config
    config.vision_head_config.use_latent_skip = use_latent_skip
    stage = HydraStage(
        name=stage, num_steps=num_steps, tasks={"generate": 16}, learning_rates=RATES[stage], muon_scale=3.0,
        warmup_steps=20, data=ToyData(), ema_decay=0.0,
    )  # fmt: skip
    return replace(recipe, config=config, stages=(stage,), seed=seed, sample_prompts=("a cat",))


@torch.no_grad()
def flow_losses(model: HydraForConditionalGeneration, processor, num_prompts: int = 128) -> tuple[list, list]:
    """The model's loss on held-out prompts at each of `SIGMAS`, and the loss of predicting no velocity."""
    generator = torch.Generator().manual_seed(0)
    samples = ToyLanguage(ToyWorld()).generate_samples(num_prompts, generator, split="test")
    batch = collate(samples, processor)
    batch.pop("labels")
    latents = model.encode_images(batch.pop("pixel_values"), batch["image_grid_thw"])  # packed
    grids = image_grids(batch["image_grid_thw"])
    noise = torch.randn(latents.shape, generator=generator)
    target, losses = velocity_target(latents, noise), []
    for level in SIGMAS:
        sigma = torch.full((num_prompts,), level)
        noisy_latents = add_noise(latents, noise, per_token(sigma, grids))
        outputs = model(**batch, latents=noisy_latents, sigma=sigma, velocity_target=target, logits_to_keep=1)
        losses.append(outputs.flow_loss.item())
    return losses, [target.square().mean().item()] * len(SIGMAS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", default=["stage1"], choices=list(RATES))
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    rows, columns = [], [f"sigma {level}" for level in SIGMAS]
    print("| stage | skip | positions | seed |", " | ".join(columns), "|")
    print("|---" * (4 + len(columns)) + "|")
    for stage, seed, skip, positions in product(options.stages, options.seeds, (False, True), (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            tower = Path(folder) / "tower"
            make_tower(positions).save_pretrained(tower)
            recipe = recipe_of(tower, stage, skip, options.num_steps, seed)
            model = HydraForConditionalGeneration.from_pretrained(
                train_hydra(recipe, Path(folder) / "run"), subfolder="model"
            )
            losses, nothing = flow_losses(model, recipe.processor)
        if not rows:
            print("| no velocity | | | |", " | ".join(f"{value:.2f}" for value in nothing), "|")
        rows.append({"stage": stage, "skip": skip, "positions": positions, "seed": seed, **dict(zip(columns, losses))})
        print(
            f"| {stage} | {skip} | {positions} | {seed} |",
            " | ".join(f"{value:.2f}" for value in losses),
            "|",
            flush=True,
        )
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
