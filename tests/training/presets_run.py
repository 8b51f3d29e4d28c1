"""The presets of the vision tower in small, under a few losses; presets_run.py FOLDER trains all of them."""

import sys
from pathlib import Path

import torch
import vision_tower_run
from transformers import InternVLVisionConfig, InternVLVisionModel, Siglip2VisionConfig, Siglip2VisionModel

from hydra_hf.modeling import HydraTokConfig
from hydra_hf.training.image_trainer import TokenizerTrainer
from hydra_hf.training.processes import partial_state
from hydra_hf.training.recipe import TokenizerLossWeights


SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 16}
LAYERS = {"num_gen_layers": 2, "num_sem_layers": 2, "image_size": 64, "latent_channels": 4}
PLAIN = TokenizerLossWeights(cosine=0.0)
DISTILL = TokenizerLossWeights(distill=1.0)


def in_small(preset: HydraTokConfig, **decoder_layers: int) -> HydraTokConfig:
    """With the preset's every choice except its sizes."""
    config = preset.to_dict() | SIZES | LAYERS
    config["decoder_config"] |= SIZES | decoder_layers
    return HydraTokConfig.from_dict(config)


INTERNVIT = in_small(HydraTokConfig.internvit_300m(), num_global_layers=1, num_flow_layers=1)
SIGLIP2 = in_small(HydraTokConfig.siglip2_so400m(), num_hidden_layers=1)
RUNS = {  # name -> config, weights of the losses, distilled blocks, modules that no loss reaches
    "internvit": (INTERNVIT, PLAIN, (), ["bottleneck.semantic_up_proj", "sem_vit"]),
    "internvit, distilled": (INTERNVIT, DISTILL, (2, 4), []),
    "internvit, distilled in part": (INTERNVIT, DISTILL, (1, 3), ["sem_vit.layers.1"]),
    "siglip2": (SIGLIP2, PLAIN, (), ["bottleneck.semantic_up_proj", "sem_vit"]),
    "siglip2, distilled": (SIGLIP2, DISTILL, (2, 4), ["sem_vit.post_layernorm"]),
}


def write_teachers(folder: Path) -> None:
    """Random ones, of the families that the presets are cut from."""
    sizes = {**SIZES, "num_hidden_layers": 4}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        internvit = InternVLVisionModel(
            InternVLVisionConfig(**sizes | {"image_size": [64, 64], "patch_size": [16, 16]})
        )
        siglip2 = Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16))
    internvit.save_pretrained(folder / "internvit")
    siglip2.save_pretrained(folder / "siglip2")


def make_trainer(folder: Path, name: str, output_dir: Path) -> TokenizerTrainer:
    config, weights, layers, _ = RUNS[name]
    teacher = str(folder / name.split(",")[0])
    stage = vision_tower_run.make_stage(folder, loss_weights=weights, teacher=teacher, distill_layers=layers)
    return vision_tower_run.make_trainer(output_dir, stage, config=config)


def run(folder: Path, output_dir: Path) -> None:
    """Two steps of each, which a second trainer resumes."""
    for name in RUNS:
        interrupted = make_trainer(folder, name, output_dir / name)
        for _ in range(2):
            interrupted.train_step()
            interrupted.step += 1
        interrupted.save_checkpoint()
        make_trainer(folder, name, output_dir / name).train()


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[1]) / "many")
    partial_state().destroy_process_group()
