"""Samples a second that one core reads from tars of JPEGs, against decoding and resizing them alone."""

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import parser, report
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from hydra_hf import TINY, HydraProcessor
from hydra_hf.data.bundles import Bundles
from hydra_hf.data.readers import create_readers
from hydra_hf.data.sources import Source
from hydra_hf.modeling import HydraImageProcessor


BAR = 0.8  # of decoding and resizing alone
BATCH_SIZE = 8
CAPTION = "a photograph of a grey cat that sleeps on a red sofa, next to a window with a view of the sea"


def write_tar(path: Path, number: int, size: tuple[int, int]) -> list[bytes]:
    """Writes JPEGs with the detail of a photograph, each with a caption, and returns them."""
    rng, images = np.random.default_rng(0), []
    with tarfile.open(path, "w") as tar:
        for index in range(number):
            coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
            noise = rng.normal(0, 8, (size[1], size[0], 1))
            levels = (np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(levels).save(buffer, "JPEG", quality=90)
            images.append(buffer.getvalue())
            for ending, content in (("jpg", images[-1]), ("txt", CAPTION.encode())):
                member = tarfile.TarInfo(f"{index:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return images


def decode_and_resize(image: bytes, size: int) -> torch.Tensor:
    levels = pil_to_tensor(Image.open(io.BytesIO(image)).convert("RGB"))
    return resize(levels, [size, size], antialias=True, interpolation=3)


def cpu_seconds(functions: dict[str, Callable[[int], object]], num_steps: int, runs: int) -> dict[str, float]:
    """Seconds on the core of all steps, of each the median of its runs. The functions take turns at every step, so that what
    else the machine does slows them alike."""
    seconds = {name: np.zeros((runs, num_steps)) for name in functions}
    for run in range(-1, runs):  # the first is to warm up, and is written over
        for step in range(num_steps):
            for name, function in functions.items():
                start = time.process_time()
                function(step)
                seconds[name][run, step] = time.process_time() - start
    return {name: np.median(values, axis=0).sum() for name, values in seconds.items()}


def measure(folder: Path, source_size: tuple[int, int], size: int, number: int, runs: int) -> list[dict]:
    """A row for each task of captions and images of one size."""
    images = write_tar(folder / "0.tar", number, source_size)
    processor = HydraProcessor.from_pretrained(TINY, subfolder="processor")
    patch_size = 14 if size % 14 == 0 else 8
    processor = HydraProcessor(
        HydraImageProcessor(size={"height": size, "width": size}, patch_size=patch_size),
        processor.tokenizer, patch_size=patch_size,
    )  # fmt: skip
    rows = []
    for task in ("generate", "understand"):
        readers = create_readers(
            (Source(task=task, path=str(folder / "0.tar")),), {task: 1}, processor, 0, max_length=8192
        )
        bundles = Bundles(readers, {task: BATCH_SIZE}, processor, num_steps=number // BATCH_SIZE)
        seconds = cpu_seconds(
            {
                "decode and resize": lambda step: [
                    decode_and_resize(image, size) for image in images[step * BATCH_SIZE :][:BATCH_SIZE]
                ],
                "bundles": bundles.__getitem__,
            },
            len(bundles), runs,
        )  # fmt: skip
        rates = {f"{name} /s": number / value for name, value in seconds.items()}
        ratio = rates["bundles /s"] / rates["decode and resize /s"]
        shape = f"{source_size[0]}x{source_size[1]} to {size}"
        rows.append({"task": task, "JPEG": shape, **rates, "ratio": ratio, "bar": BAR})
    return rows


def main(arguments: list[str] | None = None) -> None:
    arguments = parser(__doc__, layers=0).parse_args(arguments)
    torch.set_num_threads(1)
    number, sizes, size = (8, [(40, 30)], 32) if arguments.tiny else (64, [(512, 512), (1024, 768)], 448)
    rows = []
    for source_size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), source_size, size, number, arguments.runs)
    report("Samples a second and core", rows, arguments)


if __name__ == "__main__":
    main()
