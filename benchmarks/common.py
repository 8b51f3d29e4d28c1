"""What the benchmarks share: arguments, timing, and a table that is also written as JSON."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parser(description: str, layers: int, runs: int = 3, dtype: str = "fp32") -> argparse.ArgumentParser:
    """The arguments of every script; the numbers are its defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--runs", type=int, default=runs, help="timed runs, after one to warm up; the median is reported"
    )
    parser.add_argument(
        "--layers", type=int, default=layers, help="layers of the language model, or of each half of the ViT"
    )
    choices = list(DTYPES) if dtype in DTYPES else [*DTYPES, dtype]
    parser.add_argument("--dtype", choices=choices, default=dtype)
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="random small sizes, to see that the script runs")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    return parser


def medians(
    functions: dict[str, Callable], runs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that a slow minute of the machine slows all of them."""
    times = {name: [] for name in functions}
    for run in range(runs + 1):
        for name, function in functions.items():
            synchronize()
            start = clock()
            function()
            synchronize()
            if run:  # the first one warms up
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize() -> None:
    """Waits for the accelerator, whose work is asynchronous."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def report(title: str, rows: list[dict], arguments: argparse.Namespace) -> None:
    """Prints the rows under a line that names the machine, and writes both to `arguments.out`."""
    facts = machine_facts()
    facts["THP_MEM_ALLOC_ENABLE"] = os.environ.get("THP_MEM_ALLOC_ENABLE", "0")  # huge pages, read by torch
    facts |= {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    print(f"{title}\n{', '.join(f'{name} {value}' for name, value in facts.items())}")
    print_table(rows)
    if arguments.out is not None:
        write_json(arguments.out, {"title": title, "facts": facts, "rows": rows})


def machine_facts() -> dict[str, str | int]:
    facts = {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def print_table(rows: list[dict]) -> None:
    table = [list(rows[0]), *[[_text(value) for value in row.values()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def write_json(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def _text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
