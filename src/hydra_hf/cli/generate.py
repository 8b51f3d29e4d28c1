"""Generate an image or a clip from a prompt.

example: hydra generate "a cat" --out cat.png --seed 1
"""

import argparse
from pathlib import Path

from .common import (
    add_fps,
    add_model,
    add_seed,
    check_clip_out,
    check_image_out,
    load_pipeline,
    print_unknown_words,
    save_image,
    show_image,
)


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt")
    command.add_argument(
        "--out", type=Path, required=True, help="the file; its suffix names the format, .mp4, .gif or .webp for a clip"
    )
    command.add_argument("--negative_prompt", help="what to avoid; the empty prompt by default")
    add_seed(command)
    command.add_argument("--num_inference_steps", type=int, help="denoising steps; the model's own number by default")
    command.add_argument(
        "--guidance_scale", type=float, help="1 or less turns guidance off; the model's own by default"
    )
    command.add_argument("--height", type=int, help="pixels, a multiple of the patch size")
    command.add_argument("--width", type=int, help="pixels, a multiple of the patch size")
    command.add_argument("--num_frames", type=int, help="of a clip, 1 + 4n; an image by default")
    add_fps(command)
    add_model(command, "--model")


def run(options: argparse.Namespace) -> dict:
    is_clip = options.num_frames is not None
    (check_clip_out if is_clip else check_image_out)(options.out)
    pipeline = load_pipeline(options)
    print_unknown_words(pipeline.processor, options.prompt)
    import torch

    (drawn,) = pipeline(
        options.prompt,
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        generator=torch.Generator().manual_seed(options.seed),
        return_dict=False,
    )[0]
    if is_clip:
        from hydra_hf.files import write_video

        write_video(options.out, drawn, options.fps)
        width, height = drawn[0].size
        print(f"{options.out}: {len(drawn)} frames, {width}x{height}")
    else:
        save_image(drawn, options.out)
        width, height = drawn.size
        print(f"{options.out}: {width}x{height}")
        show_image(drawn)
    result = {"path": str(options.out), "width": width, "height": height, "seed": options.seed}
    return {**result, "num_frames": len(drawn)} if is_clip else result
