"""Generate an image from a prompt.

example: hydra generate "a cat" --out cat.png --seed 1
"""

import argparse
from pathlib import Path

from .common import add_model, add_seed, check_image_out, load_pipeline, print_unknown_words, save_image


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt")
    command.add_argument("--out", type=Path, required=True, help="the image file; its suffix names the format")
    command.add_argument("--negative_prompt", help="what to avoid; the empty prompt by default")
    add_seed(command)
    command.add_argument("--num_inference_steps", type=int, help="denoising steps; the model's own number by default")
    command.add_argument(
        "--guidance_scale", type=float, help="1 or less turns guidance off; the model's own by default"
    )
    command.add_argument("--height", type=int, help="pixels, a multiple of the patch size")
    command.add_argument("--width", type=int, help="pixels, a multiple of the patch size")
    add_model(command, "--model")


def run(options: argparse.Namespace) -> None:
    import torch

    check_image_out(options.out)
    pipeline = load_pipeline(options)
    print_unknown_words(pipeline.processor, options.prompt)
    image = pipeline(
        options.prompt,
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    save_image(image, options.out)
    print(f"{options.out}: {image.width}x{image.height}")
