"""Encode and decode an image or a clip.

example: hydra reconstruct cat.png --out again.png
"""

import argparse
from pathlib import Path

from .common import (
    add_fps,
    add_model,
    add_seed,
    check_clip_out,
    check_image_out,
    check_readable,
    load_pipeline,
    open_visual,
    save_image,
    show_image,
)


CHUNK_FRAMES = 64  # of a long clip: the same frames in the memory of one chunk


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", type=Path, help="an image, or a clip such as .mp4")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--num_inference_steps", type=int, help="steps of a flow decoder; the model's own by default")
    command.add_argument(
        "--num_frames", type=int, help="at most so many of a clip, 1 + 4n; the model's own by default"
    )
    add_fps(command)
    add_seed(command)
    add_model(command, "--model")


def run(options: argparse.Namespace) -> dict:
    (check_clip_out if options.out.suffix.lower() in (".mp4", ".gif") else check_image_out)(options.out)
    check_readable(options.image)
    pipeline = load_pipeline(options)
    visual = open_visual(options.image, pipeline.processor)
    reconstruct = reconstruct_clip if isinstance(visual, str) else reconstruct_image
    return {"path": str(options.out), **reconstruct(pipeline, visual, options)}


def reconstruct_image(pipeline, original, options: argparse.Namespace) -> dict:
    import torch

    from hydra_hf import HydraReconstructionPipeline
    from hydra_hf.evaluation.metrics import psnr
    from hydra_hf.modeling.grid import unpack_images

    check_image_out(options.out)
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
    score = psnr(*pair).item()
    print(f"PSNR {score:.2f} dB at {image.width}x{image.height}")
    show_image(image)
    return {"psnr": score, "width": image.width, "height": image.height}


def reconstruct_clip(pipeline, path: str, options: argparse.Namespace) -> dict:
    import torch

    from hydra_hf.evaluation.metrics import psnr
    from hydra_hf.files import write_video
    from hydra_hf.modeling.grid import unpack_images

    check_clip_out(options.out)
    tower, video_processor = pipeline.model.model.vision_tower, pipeline.processor.video_processor
    sampling = {} if options.num_frames is None else {"num_frames": options.num_frames}
    processed = video_processor(videos=path, return_tensors="pt", **sampling).to(tower.device, tower.dtype)
    (clip,) = unpack_images(processed["pixel_values_videos"], processed["video_grid_thw"], video_processor.patch_size)
    clip = clip[:, None] if clip.ndim == 3 else clip  # of one frame
    chunks = {"chunk_frames": CHUNK_FRAMES} if clip.shape[1] > CHUNK_FRAMES + 1 else {}
    with torch.no_grad():
        latents = tower.encode(clip[None], **chunks).latent_dist.mode()
        frames = tower.decode(latents, **chunks).sample
    (pictures,) = pipeline.image_processor.postprocess_video(frames.float(), output_type="pil")
    write_video(options.out, pictures, options.fps)
    score = psnr(frames[0].float().transpose(0, 1), clip.float().transpose(0, 1)).mean().item()
    width, height = pictures[0].size
    print(f"PSNR {score:.2f} dB, {len(pictures)} frames at {width}x{height}")
    return {"psnr": score, "width": width, "height": height, "num_frames": len(pictures)}
