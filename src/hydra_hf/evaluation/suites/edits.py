"""ImgEdit-Bench and GEdit-Bench: edited images in the layout of the official scorers, whose judge is a large model."""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from ..report import SuiteResult
from .drawing import Drawing, draw, limited, write_drawn


NUM_EDITS = {"imgedit": 737, "gedit": 1212}
SCORERS = {
    "imgedit": "official code of ImgEdit, Benchmark/Basic/basic_bench.py --result_img_folder FOLDER, or --suite lmms_eval --tasks imgedit",
    "gedit": "official code of Step1X-Edit, GEdit-Bench/run_gedit_score.py, or --suite lmms_eval --tasks gedit_bench",
}


def run(
    pipeline: HydraPipeline, model: str, *, suite: str, data: Path, folder: Path, image_root: Path | None = None,
    limit: int | None = None, seed: int = 0, num_inference_steps: int | None = None, guidance_scale: float | None = None,
    image_guidance_scale: float | None = None, height: int | None = None, width: int | None = None,
) -> SuiteResult:  # fmt: skip
    """Edits every image of the benchmark `suite` by its instruction."""
    edits = limited(read_imgedit(data, image_root or data.parent) if suite == "imgedit" else read_gedit(data), limit)
    settings = draw(
        pipeline, model, [drawing for _, drawing in edits], folder, seed=seed, batch_size=1, height=height, width=width,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale,
    )  # fmt: skip
    if suite == "gedit":
        for _, drawing in edits:
            source = folder / f"{drawing.file.removesuffix('.png')}_SRCIMG.png"
            if not source.is_file():
                write_drawn(source, drawing.source())
    notes = [f"Not scored here. Images in {folder}; {SCORERS[suite].replace('FOLDER', str(folder))}."]
    if len(edits) != NUM_EDITS[suite]:
        notes.append(f"{len(edits)} edits, not the {NUM_EDITS[suite]} of the benchmark.")
    return SuiteResult(suite, model, {}, settings, {"seed": seed}, {"edits": len(edits)}, notes=notes)


def read_imgedit(path: Path, image_root: Path) -> list[tuple[str, Drawing]]:
    """The edits of `singleturn.json` (key -> id, prompt, edit_type), whose ids are files below `image_root`; results are KEY.png."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        (key, Drawing(f"{key}.png", row["prompt"], (index,), partial(_open, image_root / row["id"])))
        for index, (key, row) in enumerate(rows.items())
    ]


def read_gedit(path: Path) -> list[tuple[str, Drawing]]:
    """The edits of GEdit-Bench's parquet files: fullset/TASK/LANGUAGE/KEY.png."""
    try:
        from datasets import Image as ImageFeature
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "The parquet files of GEdit-Bench are read with datasets: pip install hydra_hf[train]."
        ) from error

    files = [str(file) for file in (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"{path} has no parquet files, expected those of GEdit-Bench.")
    rows = load_dataset("parquet", data_files=files, split="train").cast_column(
        "input_image", ImageFeature(decode=False)
    )
    names = rows.select_columns(["key", "task_type", "instruction_language", "instruction"])
    return [
        (
            row["key"],
            Drawing(
                f"fullset/{row['task_type']}/{row['instruction_language']}/{row['key']}.png", row["instruction"], (index,),
                _opener(rows, index),
            ),
        )
        for index, row in enumerate(names)
    ]  # fmt: skip


def _opener(rows, index: int) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        return _open(io.BytesIO(rows[index]["input_image"]["bytes"]))

    return read


def _open(file) -> Image.Image:
    """An upright image in RGB."""
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
