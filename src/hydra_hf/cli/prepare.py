"""Prepare data beforehand: `index` finds what is where in the files of data sets, `latents` encodes their images.

example: hydra prepare latents --init hydra-1.5b --data "generate=shards/{000..123}.tar,latents=latents/shards"
"""

import argparse

from .common import add_device, choose_device


def add_options(command: argparse.ArgumentParser) -> None:
    steps = command.add_subparsers(dest="step", required=True, metavar="STEP")
    index = steps.add_parser(
        "index", help="index tars and JSON, copy Parquet into the cache, where training finds them"
    )
    index.add_argument("--data", action="append", required=True, metavar="TASK=PATH", help="as for `hydra train`")
    index.add_argument("--num_processes", type=int, help="files read at the same time; all CPU cores by default")
    index.set_defaults(prepare=_index)
    latents = steps.add_parser(
        "latents", help="encode images once, for stages that leave Gen-ViT as it is; a killed run is resumed"
    )
    latents.add_argument(
        "--data", action="append", required=True, metavar="TASK=PATH,latents=FOLDER", help="as for `hydra train`"
    )
    latents.add_argument("--init", required=True, help="folder or Hub id with the processor and the model")
    latents.add_argument("--tokenizer", help="the trained vision tower (HYDRA-TOK), in the place of the model's own")
    latents.add_argument(
        "--mixed_precision",
        choices=("bf16", "no"),
        default="bf16",
        help="of the stage that reads them; bf16 by default",
    )
    latents.add_argument("--batch_size", type=int, default=32, help="images in memory at once; 32 by default")
    latents.add_argument("--num_workers", type=int, help="processes that read ahead")
    add_device(latents)
    latents.set_defaults(prepare=_latents)


def run(options: argparse.Namespace) -> None:
    from hydra_hf.data.sources import parse_source

    for line in options.prepare(options, [parse_source(source) for source in options.data]):
        print(line, flush=True)


def _index(options: argparse.Namespace, sources: list):
    from hydra_hf.data.prepare import index_sources

    return index_sources(sources, num_processes=options.num_processes)


def _latents(options: argparse.Namespace, sources: list):
    import torch

    from hydra_hf.hub import check_model_name
    from hydra_hf.modeling import HydraProcessor, HydraTokModel
    from hydra_hf.training.latents import prepare_latents
    from hydra_hf.training.processes import partial_state

    for name in filter(None, (options.init, options.tokenizer)):
        check_model_name(name)
    device = choose_device(options.device) if options.device != "auto" else partial_state().device
    where = {"subfolder": "model"} if options.tokenizer is None else {}
    tower = HydraTokModel.from_pretrained(options.tokenizer or options.init, dtype=torch.float32, **where)
    return prepare_latents(
        sources, HydraProcessor.from_pretrained(options.init, subfolder="processor"), tower.eval().to(device),
        mixed_precision=options.mixed_precision, batch_size=options.batch_size, num_workers=options.num_workers,
    )  # fmt: skip
