"""VBench: clips in the layout of the official scorer, PROMPT-INDEX.mp4, five for each prompt."""

import json
from pathlib import Path

from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from ..report import SuiteResult
from .drawing import Drawing, draw, file_digest, limited


NUM_PROMPTS = 946
MANY, FEW = 25, 5  # clips of a prompt, with and without the dimension of flickering
FLICKERING = "temporal_flickering"


def run(
    pipeline: HydraPipeline, model: str, *, data: Path, folder: Path, limit: int | None = None, num_images: int | None = None,
    seed: int = 0, batch_size: int = 4, num_inference_steps: int | None = None, guidance_scale: float | None = None,
    height: int | None = None, width: int | None = None, num_frames: int = 17, fps: float = 8.0,
) -> SuiteResult:  # fmt: skip
    """Draws the prompts of `data`, VBench_full_info.json; HYDRA-X reports 17 frames of 384 x 640 pixels.

    `num_images` is the number of clips of each prompt, VBench's own by default.
    """
    prompts = limited(read_prompts(data), limit)
    drawings = [
        Drawing(f"{prompt}-{sample}.mp4", prompt, (index, sample))
        for index, (prompt, dimensions) in enumerate(prompts)
        for sample in range(num_images or num_clips(dimensions))
    ]
    settings = draw(
        pipeline, model, drawings, folder, seed=seed, batch_size=batch_size, height=height, width=width, fps=fps,
        num_frames=num_frames, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
    )  # fmt: skip
    notes = [
        f"Not scored here. Clips in {folder}; official code: vbench evaluate --videos_path {folder}, in an environment of its own,"
        " since vbench 0.1.5 pins transformers 4.33.2."
    ]
    if len(prompts) != NUM_PROMPTS:
        notes.append(f"{len(prompts)} prompts, not the {NUM_PROMPTS} of VBench.")
    counts = {"prompts": len(prompts), "clips": len(drawings)}
    return SuiteResult(
        "vbench", model, {}, {**settings, "data": file_digest(data)}, {"seed": seed}, counts, notes=notes
    )


def num_clips(dimensions: list[str]) -> int:
    """How many clips VBench wants of a prompt."""
    return MANY if FLICKERING in dimensions else FEW


def read_prompts(path: Path) -> list[tuple[str, list[str]]]:
    """Prompts of VBench_full_info.json and their dimensions, each prompt once."""
    prompts = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        if "/" in row["prompt_en"]:
            raise ValueError(
                f"{path} has a prompt with a slash, which cannot be the name of a file: {row['prompt_en']!r}"
            )
        prompts.setdefault(row["prompt_en"], []).extend(row["dimension"])
    return list(prompts.items())
