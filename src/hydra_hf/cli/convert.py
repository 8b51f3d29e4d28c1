"""Make initial weights from public checkpoints.

example: hydra convert --vision OpenGVLab/InternViT-300M-448px-V2_5 --language Qwen/Qwen2.5-1.5B-Instruct --out hydra-init
"""

import argparse
from pathlib import Path

from .common import add_seed, check_out_folder


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--vision", required=True, help="InternViT, InternVL or SigLIP2: folder or Hub id")
    command.add_argument(
        "--language", help="Qwen2.5, Qwen3 or Llama: folder or Hub id; without it, only a tokenizer is made"
    )
    command.add_argument("--out", type=Path, required=True, help="the new folder")
    command.add_argument(
        "--decoder",
        help="size of the flow decoder: S, M or L; by default S for InternViT, and a ViT decoder for SigLIP2",
    )
    command.add_argument("--num_gen_layers", type=int, help="layers of the ViT before the bottleneck; half by default")
    command.add_argument(
        "--dtype", help="such as bfloat16; by default the narrowest that holds all weights of the sources"
    )
    command.add_argument(
        "--shard_size", default="5GB", help="largest size of a file, and of what is in memory at a time"
    )
    command.add_argument(
        "--video", action="store_true", help="a tokenizer for images and clips, with a ViT decoder (HYDRA-X)"
    )
    add_seed(command, "for the weights that no source has")
    command.add_argument("--revision", help="of the vision model on the Hub")
    command.add_argument("--language_revision", help="of the language model on the Hub")


def run(options: argparse.Namespace) -> dict:
    check_out_folder(options.out)
    from hydra_hf.conversion.convert import convert

    folder = convert(
        options.vision,
        options.out,
        options.language,
        decoder=options.decoder,
        num_gen_layers=options.num_gen_layers,
        video=options.video,
        dtype=options.dtype,
        shard_size=options.shard_size,
        seed=options.seed,
        revision=options.revision,
        language_revision=options.language_revision,
    )
    print(folder)
    return {"path": str(folder)}
