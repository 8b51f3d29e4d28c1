"""Peak memory of a denoising step with guidance against the size of the weights; on a CPU, as Linux reports it."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch
from common import DTYPES, parser, report
from models import (
    gaussian_latents,
    guided_prompt,
    hydra_config,
    padded_together,
    random_model,
    size_name,
    tiny_config,
    whole_sequence_step,
)

from hydra_hf.modeling.image_generation import classifier_free


MEGABYTE = 2**20


def process_megabytes(field: str) -> float:
    """`field` of this process: VmRSS is its memory now, VmHWM its peak."""
    kilobytes = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)
    return int(kilobytes) * 1024 / MEGABYTE


def release_memory() -> None:
    """Returns free memory to the system; otherwise it would count for the next step."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def used_megabytes(device: str) -> float:
    release_memory()
    return process_megabytes("VmRSS") if device == "cpu" else torch.accelerator.memory_allocated() / MEGABYTE


def peak_megabytes(function: Callable, device: str) -> float:
    release_memory()
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        function()
        return torch.accelerator.max_memory_allocated() / MEGABYTE
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    function()
    return process_megabytes("VmHWM")


def copied_megabytes(prefixes: list, latents: torch.Tensor, num_time_tokens: int) -> float:
    """What a step copies to put the prompts' keys and values in front of the image's."""
    num_tokens = num_time_tokens + latents[0, 0].numel()
    total = 0
    for layer in (layer for prefix in prefixes for layer in prefix.cache.layers):
        for states in (layer.keys, layer.values):
            rows, heads, length, head_dim = states.shape
            total += rows * heads * (length + num_tokens) * head_dim * states.element_size()
    return total / MEGABYTE


@torch.no_grad()
def measure_all(arguments) -> list[dict]:
    device = arguments.device
    config = tiny_config() if arguments.tiny else hydra_config("0.5B", arguments.layers)
    before = used_megabytes(device)
    model = random_model(config, DTYPES[arguments.dtype], device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / MEGABYTE
    prompts, latents = guided_prompt(config, arguments.prompt, device), gaussian_latents(config, device)
    sigma = torch.tensor([0.7], device=device)
    padded, prefixes = padded_together(*prompts), [model.prefill(**prompt) for prompt in prompts]
    steps = {
        "whole sequence": lambda: whole_sequence_step(model, padded, latents, sigma, 4.5),
        "prefilled": lambda: model.denoise_step(latents, sigma, classifier_free(*prefixes, 4.5)),
    }
    copied = {"whole sequence": 0.0, "prefilled": copied_megabytes(prefixes, latents, config.num_time_tokens)}
    rows = []
    for name, step in steps.items():
        peaks = [peak_megabytes(step, device) - before for _ in range(arguments.runs + 1)][1:]
        peak = sorted(peaks)[len(peaks) // 2]
        rows.append(
            {"step": name, "weights MB": weights, "peak MB": peak, "peak / weights": peak / weights,
             "copied by the cache MB": copied[name]}
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    arguments_parser = parser(__doc__, layers=24, runs=3)
    arguments_parser.add_argument("--prompt", type=int, default=77, help="prompt tokens")
    arguments = arguments_parser.parse_args(arguments)
    torch.set_num_threads(arguments.threads)
    report(f"Memory of a denoising step, {size_name('0.5B', arguments)}", measure_all(arguments), arguments)


if __name__ == "__main__":
    main()
