"""Edit an image by an instruction.

example: hydra edit cat.png "remove the cat" --out empty.png
"""

import argparse
from pathlib import Path

from .common import (
    add_model,
    add_seed,
    check_image_out,
    load_pipeline,
    open_image,
    print_unknown_words,
    save_image,
    show_image,
)


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", type=Path, help="the image to edit")
    command.add_argument("instruction")
    command.add_argument("--out", type=Path, required=True, help="the image file; its suffix names the format")
    command.add_argument(
        "--reference",
        type=Path,
        action="append",
        default=[],
        help="another image that the instruction is about; repeatable",
    )
    add_seed(command)
    command.add_argument("--num_inference_steps", type=int, help="denoising steps; the model's own number by default")
    command.add_argument(
        "--guidance_scale", type=float, help="how much the instruction counts; the model's own by default"
    )
    command.add_argument(
        "--image_guidance_scale", type=float, help="how much the image counts; the model's own by default"
    )
    command.add_argument(
        "--height", type=int, help="pixels, a multiple of the patch size; like the image's by default"
    )
    command.add_argument("--width", type=int, help="pixels, a multiple of the patch size; like the image's by default")
    add_model(command, "--model")


def run(options: argparse.Namespace) -> dict:
    check_image_out(options.out)
    images = [open_image(path) for path in (*options.reference, options.image)]
    pipeline = load_pipeline(options)
    print_unknown_words(pipeline.processor, options.instruction)
    import torch

    edited = pipeline(
        options.instruction,
        image=images,
        height=options.height,
        width=options.width,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        image_guidance_scale=options.image_guidance_scale,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    save_image(edited, options.out)
    print(f"{options.out}: {edited.width}x{edited.height}")
    show_image(edited)
    return {"path": str(options.out), "width": edited.width, "height": edited.height, "seed": options.seed}
