"""One GPU in one script: does it compute what the CPU computes, and how fast, against each benchmark's baseline?

Every section is a process of its own with a time limit; one that fails or takes too long becomes a row of the table and
does not end the script. The limits add up to less than eight minutes. What a section found is printed, and in --out, before the next
one starts. Nothing is downloaded.
"""

import argparse
import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import denoise_step
import matmul_share
import memory
import text_answer
import tokenizer
import torch
from common import DTYPES, machine_facts, print_table, write_json
from models import gaussian_latents, guided_prompt, random_model, tiny_config
from torch import Tensor

from hydra_hf.modeling.image_generation import classifier_free


WIDTH = 128  # of the small models that are compared: flex attention on a GPU needs heads of at least 16
ERROR = re.compile(r"[\w.]+(Error|Exception|Unsupported|Interrupt)\b.*")  # the line of a traceback that says what
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest number, in fp32 on the CPU."""
    result, expected = result.float().cpu(), expected.float().cpu()
    return ((result - expected).abs().max() / expected.abs().max()).item()


def check(measure: str, value: float, bar: float) -> dict:
    return {"measure": measure, "value": value, "bar": bar, "passes": value <= bar}


# Does it compute what the CPU computes?


def outputs(model, device: str) -> dict[str, Tensor]:
    """The outputs of every path through a model: a question, a guided step, encoding and decoding."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    pixels = (2 * torch.rand(1, 3, side, side, generator=generator) - 1).to(device, model.dtype)
    num_tokens = config.num_time_tokens + (side // config.vision_config.patch_size) ** 2
    ids = torch.tensor([[1, config.vision_start_token_id, *[config.image_token_id] * num_tokens, 7, 8]], device=device)
    prefixes = [model.prefill(**prompt) for prompt in guided_prompt(config, 20, device)]
    latents, sigma = gaussian_latents(config, device), torch.tensor([0.7], device=device)
    encoded = model.encode_images(pixels)
    return {
        "logits": model(input_ids=ids, pixel_values=pixels).logits,
        "guided step": model.denoise_step(latents, sigma, classifier_free(*prefixes, 4.5)),
        "encode": encoded,
        "decode": model.decode_latents(encoded, generator=torch.Generator().manual_seed(0)),
    }


@torch.no_grad()
def agreement(options, dtype: str) -> list[dict]:
    model = random_model(tiny_config(WIDTH))
    expected = outputs(model, "cpu")
    results = outputs(copy.deepcopy(model).to(options.device, DTYPES[dtype]), options.device)
    return [
        check(
            f"{name}, {dtype} against fp32 on the CPU",
            relative_error(results[name], expected[name]),
            TOLERANCES[dtype],
        )
        for name in expected
    ]


@torch.no_grad()
def compiled(options) -> list[dict]:
    model = random_model(tiny_config(WIDTH), device=options.device)
    expected = outputs(model, options.device)
    model.compile_denoise_step(backend=options.backend)
    model.encode_images = torch.compile(model.encode_images, backend=options.backend)
    results = outputs(model, options.device)
    return [
        check(f"{name}, {options.backend} against eager", relative_error(results[name], expected[name]), 1e-3)
        for name in ("guided step", "encode")
    ]


@torch.no_grad()
def flex(options) -> list[dict]:
    model = random_model(tiny_config(WIDTH), device=options.device)
    expected = outputs(model, options.device)
    model.set_attn_implementation("flex_attention")
    results = outputs(model, options.device)
    return [check(f"{name}, flex against sdpa", relative_error(results[name], expected[name]), 1e-3)
            for name in ("logits", "guided step")]  # fmt: skip


# How fast?


def ratios(benchmark, options, layers: int, label: str, value: str = "ratio") -> list[dict]:
    """The rows of a benchmark as rows of this table; a bar must be reached where there is one and the sizes are real."""
    rows = []
    for row in benchmark.measure_all(SimpleNamespace(**{**vars(options), "layers": layers})):
        bar = row.get("bar", "")
        passes = "" if bar == "" or options.tiny else row[value] >= bar
        rows.append({"measure": f"{value}, {label} {row[label]}", "value": row[value], "bar": bar, "passes": passes})
    return rows


SECTIONS: dict[str, tuple[Callable, int]] = {
    "agreement fp32": (lambda options: agreement(options, "fp32"), 30),
    "agreement bf16": (lambda options: agreement(options, "bf16"), 30),
    "compile": (compiled, 80),
    "flex attention": (flex, 95),
    "denoise_step": (lambda options: ratios(denoise_step, options, 28, "prompt tokens"), 50),
    "tokenizer": (lambda options: ratios(tokenizer, options, 12, "task"), 60),
    "text_answer": (lambda options: ratios(text_answer, options, 24, "tokens"), 60),
    "matmul_share": (lambda options: ratios(matmul_share, options, 24, "dtype", "share"), 40),
    "memory": (lambda options: ratios(memory, options, 24, "step", "peak / weights"), 30),
}  # what returns the rows, and its time limit in seconds


def run(name: str, options: SimpleNamespace, limit: float) -> list[dict]:
    """The rows of a section, or one that says why there are none. It is a new run of this script: a forked process could not use
    the GPU."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--device", options.device, "--only", name, *["--quick"] * options.tiny]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        rows = rows_of(result)
    except subprocess.TimeoutExpired:
        rows = failed_row(f"stopped after {limit} s")
    seconds = time.perf_counter() - start
    return [{"section": name, **row, "seconds": seconds} for row in rows]


def rows_of(result: subprocess.CompletedProcess) -> list[dict]:
    """What a section has printed last: its rows, or its error."""
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    errors = result.stderr.split("\nTraceback")[-1].strip().splitlines()
    messages = [line for line in errors if ERROR.match(line)]
    return failed_row(messages[-1][:200] if messages else f"the process ended with code {result.returncode}")


def failed_row(message: str) -> list[dict]:
    return [{"measure": message, "value": "", "bar": "", "passes": False}]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda", help="cpu also works, to see that the script runs")
    parser.add_argument("--quick", action="store_true", help="random small sizes, one run, no inductor")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--only", choices=SECTIONS, help="one section, in this process; prints its rows as JSON")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    options = SimpleNamespace(
        device=given.device, tiny=given.quick, backend="aot_eager" if given.quick else "inductor", prompt=77,
        runs=1 if given.quick else 3, dtype="fp32" if given.quick else "bf16",
    )  # fmt: skip
    if given.only:
        print(json.dumps(SECTIONS[given.only][0](options)))
        return 0
    rows, failed = [], []
    for name in given.sections:
        found = run(name, options, SECTIONS[name][1])
        print_table(found)
        rows += found
        failed = [row["section"] for row in rows if row["passes"] is False]
        write_json(given.out, {"facts": machine_facts(), "options": vars(options), "rows": rows, "failed": failed})
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
