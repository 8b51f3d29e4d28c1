"""Prepare data before training: index, latents, targets.

example: hydra prepare latents --init hydra-1.5b --data "generate=shards/{000..123}.tar,latents=latents/shards"
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from .common import add_device, check_out_folder, choose_device, use_device


def add_options(command: argparse.ArgumentParser) -> None:
    steps = command.add_subparsers(dest="step", required=True, metavar="STEP")
    index = steps.add_parser(
        "index", help="index tars and JSON, copy Parquet into the cache, where training finds them"
    )
    index.add_argument("--data", action="append", required=True, metavar="TASK=PATH", help="as for `hydra train`")
    index.add_argument("--num_processes", type=int, help="files read at the same time; all CPU cores by default")
    index.set_defaults(prepare=_index)
    latents = steps.add_parser(
        "latents", help="encode images once, for stages that do not train Gen-ViT; a killed run is resumed"
    )
    latents.add_argument(
        "--data", action="append", required=True, metavar="TASK=PATH,latents=FOLDER", help="as for `hydra train`"
    )
    latents.add_argument("--init", required=True, help="folder or Hub id with the processor and the model")
    latents.add_argument("--tokenizer", help="the trained vision tower (HYDRA-TOK), instead of the model's own")
    latents.add_argument(
        "--mixed_precision",
        choices=("bf16", "no"),
        default="bf16",
        help="that of the stage that reads them; bf16 by default",
    )
    latents.add_argument("--image_size", type=int, help="that of the stage that reads them, if it has one")
    latents.add_argument("--batch_size", type=int, default=32, help="images in memory at once; 32 by default")
    latents.add_argument("--num_workers", type=int, help="processes that read ahead")
    add_device(latents)
    latents.set_defaults(prepare=_latents)
    _add_unimrg(steps.add_parser("unimrg", help="make depth maps and boundaries of images, as targets to paint"))


def run(options: argparse.Namespace) -> Iterator[dict]:
    for line in options.prepare(options):
        print(line, flush=True)
        if not isinstance(line, str):  # a report; the others tell how far it is
            yield asdict(line)


def _sources(options: argparse.Namespace) -> list:
    from hydra_hf.data.sources import parse_source

    return [parse_source(source) for source in options.data]


def _index(options: argparse.Namespace):
    from hydra_hf.data.prepare import index_sources

    return index_sources(_sources(options), num_processes=options.num_processes)


def _latents(options: argparse.Namespace):
    import torch

    from hydra_hf.hub import check_model_name, subfolder_of
    from hydra_hf.modeling import HydraProcessor, HydraTokModel
    from hydra_hf.training.latents import prepare_latents
    from hydra_hf.training.processes import partial_state
    from hydra_hf.training.recipe import limit_size

    sources = _sources(options)
    for name in filter(None, (options.init, options.tokenizer)):
        check_model_name(name)
    device = choose_device(options.device) if options.device != "auto" else partial_state().device
    processor = HydraProcessor.from_pretrained(options.init, subfolder=subfolder_of(options.init, "processor"))
    if options.image_size is not None:
        limit_size(processor.image_processor, options.image_size)
    where = {"subfolder": subfolder_of(options.init, "model")} if options.tokenizer is None else {}
    tower = HydraTokModel.from_pretrained(options.tokenizer or options.init, dtype=torch.float32, **where)
    return prepare_latents(
        sources, processor, tower.eval().to(device), mixed_precision=options.mixed_precision,
        batch_size=options.batch_size, num_workers=options.num_workers,
    )  # fmt: skip


def _add_unimrg(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", type=Path, required=True, help="folder of images, or LLaVA's JSON or JSONL")
    command.add_argument(
        "--image_root",
        type=Path,
        help="for JSON: the folder that image paths are relative to; by default that of the file",
    )
    command.add_argument("--out", type=Path, required=True, help="folder of the targets; run again, it is completed")
    command.add_argument(
        "--depth_model",
        default="depth-anything/Depth-Anything-V2-Large-hf",
        help="folder or Hub id of a Depth-Anything or DPT model; the default's licence is CC-BY-NC-4.0",
    )
    command.add_argument("--segment_model", default="facebook/sam-vit-huge", help="folder or Hub id of a SAM")
    command.add_argument("--only", choices=("depth", "segment"), help="make only these")
    command.add_argument(
        "--size",
        default="448",
        help="training size that boundaries are drawn for: 448 has as many pixels as 448x448, in the nearest of a few aspect"
        " ratios; 448x448 is exactly that size",
    )
    command.add_argument("--patch_size", type=int, default=14, help="that of the model to be trained")
    command.add_argument(
        "--points_per_side", type=int, default=32, help="SAM is prompted with a grid of this many points a side"
    )
    add_device(command)
    command.set_defaults(prepare=_unimrg)


def _unimrg(options: argparse.Namespace) -> list:
    from datetime import timedelta

    from hydra_hf.data.prepare_targets import prepare_targets
    from hydra_hf.training.processes import partial_state

    if not options.images.exists():
        raise ValueError(f"--images {options.images} does not exist, expected a folder of images, or JSON.")
    check_out_folder(options.out)
    use_device(options.device)
    state = partial_state(timeout=timedelta(days=30))  # the first process may wait that long for the last one
    report = prepare_targets(
        options.images, options.out, _painters(options, state.device), state, image_root=options.image_root
    )
    return [report] if state.is_main_process else []


def _painters(options: argparse.Namespace, device) -> list:
    """Raises ValueError for a size, a grid or a model that cannot be used."""
    from transformers.utils import logging

    from hydra_hf.data.targets import DepthPainter, SegmentPainter, image_policy

    image_processor = image_policy(options.size, options.patch_size)
    if options.points_per_side < 1:
        raise ValueError(f"--points_per_side {options.points_per_side} must be at least 1.")
    logging.disable_progress_bar()
    painters = {
        "depth": lambda: DepthPainter(options.depth_model, device),
        "segment": lambda: SegmentPainter(options.segment_model, device, image_processor, options.points_per_side),
    }
    return [paint() for name, paint in painters.items() if options.only in (None, name)]
