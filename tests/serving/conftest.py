"""The embedded checkpoint, its engine, and a server of it on a free port, driven with OpenAI's own client."""

import queue
import threading
import time

import numpy as np
import pytest
from PIL import Image

from hydra_hf import TINY, HydraPipeline
from hydra_hf.serving.engine import Engine, Job
from hydra_hf.serving.jobs import Done, Drawn, Text


NAME = "hydra-tiny"


@pytest.fixture(scope="session")
def pipeline() -> HydraPipeline:
    pipeline = HydraPipeline.from_pretrained(TINY)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Listener:
    """A job, and what it gave so far."""

    def __init__(self, request):
        self.events = queue.Queue()
        self.job = Job(request, self.events.put)

    def collected(self) -> tuple[str, list[Image.Image], Done]:
        """Text, images and end. Raises what the job failed with."""
        text, images, event = "", [], None
        while not isinstance(event, Done):
            event = self.events.get(timeout=300)
            if isinstance(event, Exception):
                raise event
            text += event.text if isinstance(event, Text) else ""
            images += [event.image] if isinstance(event, Drawn) else []
        return text, images, event


def run_together(pipeline: HydraPipeline, requests: list, max_batch_size: int = 16) -> tuple[list, Engine]:
    """What requests give that arrive at once, and the engine that ran them, turn by turn in this thread."""
    engine, listeners = Engine(pipeline, max_batch_size), [Listener(request) for request in requests]
    engine.waiting.extend(listener.job for listener in listeners)
    while engine.waiting or engine.active:
        engine.turn()
    return [listener.collected() for listener in listeners], engine


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def largest_difference(image: Image.Image, other: Image.Image) -> int:
    """In levels from 0 to 255."""
    return abs(levels(image) - levels(other)).max()


@pytest.fixture(scope="session")
def serve(pipeline):
    """A function that serves the checkpoint with some limits, and returns the address and the app."""
    uvicorn = pytest.importorskip("uvicorn")
    for package in ("fastapi", "prometheus_client", "openai"):
        pytest.importorskip(package)
    from hydra_hf.serving.app import create_app
    from hydra_hf.serving.limits import Limits

    running = []

    def start(api_key: str | None = None, **limits):
        app = create_app(pipeline, NAME, Limits(**limits), api_key)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}", app.state.server

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(timeout=30)


@pytest.fixture(scope="session")
def served(serve):
    return serve()


@pytest.fixture(scope="session")
def client(served):
    import openai

    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="unused", max_retries=0)
