"""A tiny tokenizer before all its judges; also a program, so that tests can launch it on several processes.

python vision_tower_run.py FOLDER JUDGES [MICRO_BATCH_SIZE]
"""

import sys
from dataclasses import replace
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from hydra_hf.data.images import HeldOut
from hydra_hf.modeling import HydraTokConfig, HydraTokModel, PixelFlowDecoderConfig
from hydra_hf.toy.batches import ToyBatches, ToyData, ToyHeldOut
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.checkpoints import last_whole_checkpoint
from hydra_hf.training.image_trainer import TokenizerTrainer
from hydra_hf.training.recipe import Recipe, TokenizerLossWeights, TokenizerStage
from hydra_hf.training.vision_tower_trainer import create_stage_model


SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 16,
    "initializer_range": 0.1,
}
DECODER = PixelFlowDecoderConfig(num_global_layers=1, num_flow_layers=1, **SIZES)
CONFIG = HydraTokConfig(num_gen_layers=2, num_sem_layers=1, image_size=64, latent_channels=4, **SIZES)
BACKBONE = "timm:test_efficientnet"


def write_judges(folder: Path) -> None:
    """A random teacher and a random backbone."""
    torch.manual_seed(1)
    HydraTokModel(CONFIG).save_pretrained(folder / "teacher")
    save_file(timm.create_model(BACKBONE.removeprefix("timm:")).state_dict(), folder / "backbone.safetensors")


def make_stage(judges: Path, **changes) -> TokenizerStage:
    """Every loss of both stages at once."""
    stage = TokenizerStage(
        name="all",
        data=ToyData(),
        held_out=ToyData(is_held_out=True),
        num_steps=3,
        batch_size=4,
        learning_rates={"model": 1e-4},  # Adam makes a whole step of a gradient that is only rounding
        warmup_steps=1,
        decoder_config=DECODER,
        loss_weights=TokenizerLossWeights(distill=1.0, perceptual=0.1, adversarial=0.075, discriminator=1.0),
        teacher=str(judges / "teacher"),
        distill_layers=(1, 2, 3),
        perceptual_backbone=BACKBONE,
        perceptual_weights=str(judges / "backbone.safetensors"),
        discriminator_learning_rate=3e-5,
        discriminator_start=1,
        mixed_precision="no",
        num_held_out=5,  # which two processes do not divide
    )
    return replace(stage, **changes)


def make_trainer(
    folder: Path, stage: TokenizerStage, micro_batch_size: int | None = None, config=CONFIG, **recipe
) -> TokenizerTrainer:
    recipe = Recipe(name="test", config=config, stages=(stage,), **recipe)
    torch.manual_seed(0)
    world = ToyWorld(1)
    return TokenizerTrainer(
        create_stage_model(recipe, stage, None), stage, ToyBatches(world, stage.batch_size, 1),
        HeldOut(ToyHeldOut(world, stage.num_held_out, 1)), folder, micro_batch_size=micro_batch_size,
        log_every=1, save_every=2, sample_every=3,
    )  # fmt: skip


def last_checkpoint(folder: Path) -> Path:
    return Path(last_whole_checkpoint(folder))


if __name__ == "__main__":
    folder, judges, *micro_batch_size = sys.argv[1:]
    stage = make_stage(Path(judges), adaptive_adversarial_weight=not micro_batch_size)
    make_trainer(Path(folder), stage, *map(int, micro_batch_size)).train()
