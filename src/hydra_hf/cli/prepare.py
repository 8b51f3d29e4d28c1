"""Prepare data beforehand: `index` finds what is where in the files of data sets, in parallel.

example: hydra prepare index --data "generate=shards/{000..123}.tar"
"""

import argparse


def add_options(command: argparse.ArgumentParser) -> None:
    steps = command.add_subparsers(dest="step", required=True, metavar="STEP")
    index = steps.add_parser(
        "index", help="index tars and JSON, copy Parquet into the cache, where training finds them"
    )
    index.add_argument("--data", action="append", required=True, metavar="TASK=PATH", help="as for `hydra train`")
    index.add_argument("--num_processes", type=int, help="files read at the same time; all CPU cores by default")


def run(options: argparse.Namespace) -> None:
    from hydra_hf.data.prepare import index_sources
    from hydra_hf.data.sources import parse_source

    sources = [parse_source(source) for source in options.data]
    for line in index_sources(sources, num_processes=options.num_processes):
        print(line, flush=True)
