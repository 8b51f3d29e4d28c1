"""Encode and decode an image.

example: hydra reconstruct cat.png --out again.png
"""

import argparse
from pathlib import Path

from .common import add_model, add_seed, check_image_out, load_pipeline, open_image, save_image


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--num_inference_steps", type=int, help="steps of a flow decoder; the model's own by default")
    add_seed(command)
    add_model(command, "--model")


def run(options: argparse.Namespace) -> None:
    import torch

    from hydra_hf import HydraReconstructionPipeline
    from hydra_hf.evaluation.metrics import psnr
    from hydra_hf.modeling.grid import unpack_images

    check_image_out(options.out)
    original = open_image(options.image)
    pipeline = load_pipeline(options)
    image_processor = pipeline.processor.image_processor
    image = HydraReconstructionPipeline(
        vision_tower=pipeline.model.model.vision_tower, image_processor=image_processor
    )(
        original,
        num_inference_steps=options.num_inference_steps,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    save_image(image, options.out)
    pair = [
        unpack_images(**image_processor(picture, return_tensors="pt"), patch_size=image_processor.patch_size)[0][None]
        for picture in (original, image)
    ]
    print(f"PSNR {psnr(*pair).item():.2f} dB at {image.width}x{image.height}")
