"""Requests a second of `hydra serve` on the embedded checkpoint: many clients at once against one at a time, and none lost.

python benchmarks/serving.py --threads 2                                      16 clients
python benchmarks/serving.py --threads 2 --kinds answer --clients 1000 --requests 1000

The ratio of CPU times is how much work sharing saves; unlike that of the rates, it does not depend on what else the machine does.
"""

import argparse
import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import openai
import torch
import uvicorn
from common import parser, report

from hydra_hf import TINY, HydraPipeline
from hydra_hf.serving.app import create_app
from hydra_hf.serving.engine import Engine
from hydra_hf.serving.images import data_url, encode_image


BAR = 3  # times as many requests a second as one at a time, with 16 clients
NAME = "hydra-tiny"


@contextmanager
def serving(pipeline: HydraPipeline) -> Iterator[tuple[str, Engine]]:
    """The address of a server in a thread of this process, and its engine."""
    app = create_app(pipeline, NAME)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", app.state.server.engine
    server.should_exit = True
    thread.join()


def create_requests(
    client: openai.AsyncOpenAI, image_url: str, steps: int
) -> dict[str, Callable[[int], Awaitable[str]]]:
    """A request of each kind, by number, as a function that gives what came back."""

    async def answer(number: int) -> str:
        content = [
            {"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": "what is in the picture?"}
        ]  # fmt: skip
        messages = [{"role": "user", "content": content}]
        given = await client.chat.completions.create(model=NAME, messages=messages, modalities=["text"], seed=number)
        return given.choices[0].message.content

    async def sampled_text(number: int) -> str:
        given = await client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "two apples"}], modalities=["text"], seed=number,
            max_tokens=64, temperature=2.0,
        )  # fmt: skip
        return given.choices[0].finish_reason

    async def image(number: int) -> str:
        options = {"seed": number, "num_inference_steps": steps}
        given = await client.images.generate(model=NAME, prompt="two apples", extra_body=options)
        return given.data[0].b64_json

    return {"answer": answer, "text": sampled_text, "image": image}


@dataclass
class Run:
    """Seconds of all requests, on the clock and of this process's CPU time; of each request; and how many got nothing."""

    wall: float
    cpu: float
    each: list[float]
    lost: int


async def send(request: Callable[[int], Awaitable[str]], number: int, clients: int) -> Run:
    """Sends `number` requests, of which `clients` are under way at any time."""
    room, seconds, lost = asyncio.Semaphore(clients), [], 0

    async def one(index: int) -> None:
        nonlocal lost
        async with room:
            start = time.perf_counter()
            try:
                lost += not await request(index)
            except openai.OpenAIError as error:
                print(f"request {index}: {error!r:.200}")
                lost += 1
            seconds.append(time.perf_counter() - start)

    start, cpu_start = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(one, range(number)))
    return Run(time.perf_counter() - start, time.process_time() - cpu_start, seconds, lost)


async def measure_all(address: str, engine: Engine, image_url: str, arguments: argparse.Namespace) -> list[dict]:
    client = openai.AsyncOpenAI(base_url=address, api_key="unused", max_retries=0, timeout=3600)
    requests, rows = create_requests(client, image_url, arguments.steps), []
    for kind in arguments.kinds:
        await send(requests[kind], 2, 1)  # warms up
        alone = await send(requests[kind], arguments.alone, 1)
        forwards, in_all = engine.num_forwards.total(), engine.num_rows.total()
        together = await send(requests[kind], arguments.requests, arguments.clients)
        rates = {"one at a time /s": arguments.alone / alone.wall, "together /s": arguments.requests / together.wall}
        costs = {"CPU s alone": alone.cpu / arguments.alone, "CPU s together": together.cpu / arguments.requests}
        rows.append({
            "kind": kind, "clients": arguments.clients, "requests": arguments.requests, "lost": together.lost, **rates,
            "ratio": rates["together /s"] / rates["one at a time /s"], "bar": BAR,
            **costs, "CPU ratio": costs["CPU s alone"] / costs["CPU s together"],
            "median s": statistics.median(together.each), "slowest s": max(together.each),
            "rows a forward": (engine.num_rows.total() - in_all) / (engine.num_forwards.total() - forwards),
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)  # a long run shows what it has
    await client.close()
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, layers=0)
    options.add_argument(
        "--kinds", nargs="+", choices=["answer", "text", "image"], default=["answer", "text", "image"]
    )
    options.add_argument("--clients", type=int, default=16, help="requests under way at any time")
    options.add_argument("--requests", type=int, default=64)
    options.add_argument("--alone", type=int, default=8, help="requests that are sent one at a time")
    options.add_argument("--steps", type=int, default=24, help="denoising steps of an image")
    arguments = options.parse_args(arguments)
    if arguments.tiny:
        arguments.clients, arguments.requests, arguments.alone, arguments.steps = 2, 2, 1, 1
    torch.set_num_threads(arguments.threads)
    pipeline = HydraPipeline.from_pretrained(TINY).to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("two apples", num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images[0]
    with serving(pipeline) as (address, engine):
        rows = asyncio.run(measure_all(address, engine, data_url(encode_image(picture)), arguments))
    report("Requests a second of hydra serve, embedded checkpoint", rows, arguments)


if __name__ == "__main__":
    main()
