"""DPG-Bench, WISE and T2I-CompBench: prompts drawn in the layout of the official scorers, and listed for evalscope.

None of the three is scored here: their judges are mPLUG, GPT-4o, and BLIP-VQA with UniDet. `evalscope.jsonl` in the folder
has the prompts and images in the form of evalscope's `general_t2i` (`image_path`), which computes its own metrics of them.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hydra_hf.files import write_file, write_text
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from ..report import SuiteResult
from .drawing import Drawing, draw, file_digest, limited


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark, its id there and its category."""

    id: str
    text: str
    category: str


@dataclass(frozen=True)
class Benchmark:
    """
    How a benchmark is read, drawn and judged.

    Args:
        read: its prompts, from the file or folder that the benchmark distributes.
        num_prompts: of the whole benchmark.
        num_images: for each prompt.
        file: the name of an image, from the prompt, the image's number in its category, and its number among those of the prompt.
        scorer: what is left to do for the published score.
    """

    read: Callable[[Path], list[Prompt]]
    num_prompts: int
    num_images: int
    file: Callable[[Prompt, int, int], str]
    scorer: str


def read_dpg_bench(path: Path) -> list[Prompt]:
    """The folder `dpg_bench/prompts` of ELLA: NAME.txt has one prompt."""
    return [Prompt(file.stem, file.read_text(encoding="utf-8").strip(), "") for file in sorted(path.glob("*.txt"))]


def read_wise(path: Path) -> list[Prompt]:
    """A JSON file of WISE, or the folder of its three: rows with prompt_id, Prompt and Category."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    prompts = [Prompt(str(int(row["prompt_id"])), row["Prompt"], row.get("Category", "")) for row in rows]
    return sorted(prompts, key=lambda prompt: int(prompt.id))


def read_t2i_compbench(path: Path) -> list[Prompt]:
    """A file such as `color_val.txt`, or the folder of them: one prompt on each line."""
    files = sorted(path.glob("*_val.txt")) if path.is_dir() else [path]
    return [
        Prompt(f"{file.stem}_{index}", line.strip().split("\t")[0], file.stem.removesuffix("_val"))
        for file in files
        for index, line in enumerate(file.read_text(encoding="utf-8").splitlines())
        if line.strip()
    ]


BENCHMARKS = {
    "dpg_bench": Benchmark(
        read_dpg_bench, 1065, 4, lambda prompt, number, sample: f"samples/{prompt.id}_{sample}.png",
        "official code of ELLA on FOLDER/images: dpg_bench/compute_dpg_bench.py --image-root-path FOLDER/images, with --resolution"
        " the side of one image",
    ),
    "wise": Benchmark(
        read_wise, 1000, 1, lambda prompt, number, sample: f"images/{prompt.id}.png",
        "official code of WISE, gpt_eval.py on FOLDER/images, or --suite lmms_eval --tasks WISE with a judge",
    ),
    "t2i_compbench": Benchmark(
        read_t2i_compbench, 2400, 10,
        lambda prompt, number, sample: f"{prompt.category}/samples/{_file_name(prompt.text)}_{number:06}.png",
        "official code of T2I-CompBench on each folder: BLIPvqa_eval, UniDet_eval, 3_in_1_eval --out_dir FOLDER/CATEGORY",
    ),
}  # fmt: skip


def run(
    pipeline: HydraPipeline, model: str, *, suite: str, data: Path, folder: Path, limit: int | None = None,
    num_images: int | None = None, seed: int = 0, batch_size: int = 16, num_inference_steps: int | None = None,
    guidance_scale: float | None = None, height: int | None = None, width: int | None = None,
) -> SuiteResult:  # fmt: skip
    """Draws the prompts of the benchmark `suite`."""
    benchmark = BENCHMARKS[suite]
    prompts = limited(benchmark.read(data), limit)
    num_images = num_images or benchmark.num_images
    drawings, numbers = [], Counter()
    for index, prompt in enumerate(prompts):
        for sample in range(num_images):
            file = benchmark.file(prompt, numbers[prompt.category], sample)
            drawings.append(Drawing(file, prompt.text, (index, sample)))
            numbers[prompt.category] += 1
    if len({drawing.file for drawing in drawings}) < len(drawings):
        raise ValueError(
            f"{data} has two prompts with one name, or more images than the layout of {suite} has room for."
        )
    settings = draw(
        pipeline, model, drawings, folder, seed=seed, batch_size=batch_size, height=height, width=width,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
    )  # fmt: skip
    if suite == "dpg_bench":
        for index, prompt in enumerate(prompts):
            files = [folder / drawing.file for drawing in drawings[index * num_images : (index + 1) * num_images]]
            write_grid(folder / "images" / f"{prompt.id}.png", files)
    shown = [prompt for prompt in prompts for _ in range(num_images)]
    write_evalscope(folder / "evalscope.jsonl", shown, [drawing.file for drawing in drawings])
    notes = [f"Not scored here. Images in {folder}; {benchmark.scorer.replace('FOLDER', str(folder))}."]
    if len(prompts) != benchmark.num_prompts:
        notes.append(f"{len(prompts)} prompts, not the {benchmark.num_prompts} of the benchmark.")
    digests = {file.name: file_digest(file) for file in ([data] if data.is_file() else [])}
    return SuiteResult(
        suite, model, {}, {**settings, **({"data": digests} if digests else {}), "images for each prompt": num_images},
        {"seed": seed}, {"prompts": len(prompts), "images": len(drawings)}, notes=notes,
    )  # fmt: skip


def write_grid(path: Path, files: list[Path]) -> None:
    """The images of a prompt as one, in two columns, as DPG-Bench wants them."""
    images = [Image.open(file) for file in files]
    width, height = images[0].size
    grid = Image.new("RGB", (width * min(2, len(images)), height * -(-len(images) // 2)))
    for index, image in enumerate(images):
        grid.paste(image, (index % 2 * width, index // 2 * height))
    write_file(path, grid.save)


def write_evalscope(path: Path, prompts: list[Prompt], files: list[str]) -> None:
    """A row for each image, in the form of evalscope's `general_t2i`; the paths are absolute."""
    rows = [
        {"id": f"{prompt.id}_{index}", "prompt": prompt.text, "category": prompt.category,
         "image_path": str((path.parent / file).resolve())}
        for index, (prompt, file) in enumerate(zip(prompts, files))
    ]  # fmt: skip
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _file_name(text: str) -> str:
    """A prompt as part of a file's name, which has no slash and at most 255 bytes."""
    return text.replace("/", " ").encode()[:240].decode(errors="ignore")
