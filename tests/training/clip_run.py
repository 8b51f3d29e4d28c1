"""A tiny tower for clips before both teachers; a program, so that tests can launch it on several processes: clip_run.py OUT."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_clip_training import CONFIG, STAGE
from transformers import SiglipVisionConfig, SiglipVisionModel, VideoMAEConfig, VideoMAEModel

from hydra_hf.training.processes import partial_state
from hydra_hf.training.recipe import Recipe, TokenizerLossWeights
from hydra_hf.training.teachers import TransformersTeacher
from hydra_hf.training.video_teachers import VideoTeacher
from hydra_hf.training.vision_tower_trainer import train_tokenizer


SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 16}


def image_teacher() -> TransformersTeacher:
    torch.manual_seed(1)
    return TransformersTeacher(SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=64, patch_size=32)).eval())


def video_teacher() -> VideoTeacher:
    torch.manual_seed(1)
    return VideoTeacher(VideoMAEModel(VideoMAEConfig(**SIZES, image_size=32, num_frames=8)).eval())


def train(output_dir: Path) -> None:
    stage = replace(
        STAGE,
        keeps_image_latents=False,
        learning_rates={"model": 1e-4, "decompressor": 1e-4},
        muon_scale=0.0,
        loss_weights=TokenizerLossWeights(distill=1.0, video_distill=1.0),
        teacher=image_teacher,
        video_teacher=video_teacher,
        video_teacher_size=32,
    )
    train_tokenizer(Recipe(name="test", config=CONFIG, stages=(stage,), log_every=1, sample_every=4), output_dir)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
    partial_state().destroy_process_group()
