"""Serve a model over HTTP to OpenAI's clients.

example: hydra serve --port 8000
"""

import argparse
import os
from dataclasses import fields
from pathlib import Path

from .common import add_model, load_pipeline


def add_options(command: argparse.ArgumentParser) -> None:
    from hydra_hf.serving.limits import Limits

    add_model(command, "model", nargs="?")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network")
    command.add_argument("--port", type=int, default=8000)
    command.add_argument("--served_model_name", help="the model's name for clients; its folder or Hub id by default")
    command.add_argument("--api_key", help="what clients must send; the variable HYDRA_API_KEY by default")
    for limit in fields(Limits):
        command.add_argument(f"--{limit.name}", type=int, default=limit.default, help=limit.metadata["help"])


def run(options: argparse.Namespace) -> None:
    from hydra_hf.pipelines.arguments import check_integer
    from hydra_hf.serving.limits import Limits

    limits = {limit.name: check_integer(f"--{limit.name}", getattr(options, limit.name)) for limit in fields(Limits)}
    try:
        import uvicorn

        from hydra_hf.serving.app import create_app
    except ModuleNotFoundError as error:
        raise ValueError(f"hydra serve needs {error.name}: pip install hydra_hf[serve]") from error
    pipeline = load_pipeline(options)
    path = Path(options.model)
    name = options.served_model_name or (path.resolve().name if path.is_dir() else options.model)
    app = create_app(pipeline, name, Limits(**limits), options.api_key or os.environ.get("HYDRA_API_KEY"))
    print(f"{name} at http://{options.host}:{options.port}/v1, Ctrl-C ends", flush=True)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
