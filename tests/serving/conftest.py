"""The embedded checkpoint, its engine, and a server of it on a free port, driven with OpenAI's own client."""

import threading
import time

import pytest
from serving_runs import NAME

from hydra_hf import TINY, HydraPipeline


@pytest.fixture(scope="session")
def pipeline() -> HydraPipeline:
    pipeline = HydraPipeline.from_pretrained(TINY)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
