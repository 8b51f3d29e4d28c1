"""The routes, as OpenAI's clients call them: chat with images in and out, drawing, editing, models, health, metrics."""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..pipelines.pipeline_hydra import HydraPipeline
from .bodies import ChatBody, EditBody, ImageBody
from .chat_answers import AnswerParts, chunk, completion, event_line, usage
from .engine import Engine, EngineStoppedError, Job, QueueFullError
from .errors import APIError, add_handlers, invalid, of_fields
from .images import data_url, encode_image
from .jobs import ChatRequest, Done, Drawn, ImageRequest, Text
from .limits import Limits
from .metrics import CountRequests, Metrics
from .requests import RequestReader


class Server:
    """One model and what its routes share."""

    def __init__(self, pipeline: HydraPipeline, name: str, limits: Limits):
        self.name, self.limits, self.created = name, limits, int(time.time())
        self.engine = Engine(pipeline, limits.max_batch_size, limits.max_queue)
        self.reader, self.metrics = RequestReader(pipeline, limits), Metrics(self.engine)
        self.reading = ThreadPoolExecutor(1, "hydra-reader")  # one thread, see RequestReader

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise APIError(
                404, f"The model {name!r} does not exist; there is {self.name!r}.", "model", "model_not_found"
            )

    def card(self) -> dict:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "hydra_hf"}

    async def read(self, read: Callable, *arguments) -> list[ChatRequest] | list[ImageRequest]:
        """What the body asks for. Raises APIError for what is wrong with it."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.reading, read, *arguments)
        except ValueError as error:
            raise invalid(str(error)) from error

    def submit(self, requests: list[ChatRequest] | list[ImageRequest]) -> "Events":
        """The events of these requests, which run from now on. Raises APIError if there is no room for them."""
        events = Events(requests)
        try:
            self.engine.submit(events.jobs)
        except (QueueFullError, EngineStoppedError) as error:
            raise as_api_error(error) from error
        return events


def as_api_error(error: Exception) -> APIError:
    """What a client is told about the end of its job."""
    if isinstance(error, QueueFullError):
        return APIError(429, f"{error} Try again later.", code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, EngineStoppedError):
        return APIError(503, str(error), code="stopping")
    if isinstance(error, ValueError):
        return invalid(str(error))
    return APIError(500, "The server had an error; its log says which.")


class Events:
    """The events of the jobs of one request, on the event loop of the server."""

    def __init__(self, requests: list[ChatRequest] | list[ImageRequest]):
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()
        self.jobs = [Job(request, self._listener(index)) for index, request in enumerate(requests)]
        self.num_left = len(self.jobs)

    def _listener(self, index: int) -> Callable[[object], None]:
        return lambda event: self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

    async def next(self) -> tuple[int, Text | Drawn | Done] | None:
        """The next event and whose it is; None at the end. Raises APIError if a job fails."""
        if not self.num_left:
            return None
        index, event = await self.queue.get()
        if isinstance(event, Exception):
            raise as_api_error(event) from event
        self.num_left -= isinstance(event, Done)
        return index, event

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()


async def unless_gone(request: Request, events: Events, awaited: Awaitable):
    """The result, unless the client disconnects before: then its jobs are cancelled."""
    task, gone = asyncio.ensure_future(awaited), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "The client closed the connection")
        return task.result()
    except BaseException:
        events.cancel()
        raise
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class BodyLimit:
    """Refuses large bodies as they come. Starlette's own middleware does not answer in OpenAI's format."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def receive_and_count() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise HTTPException(413, f"The body has more than {self.max_bytes} bytes")
            return message

        await self.app(scope, receive_and_count, send)


def create_app(
    pipeline: HydraPipeline, name: str, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """The server of one model, under `name`. With an `api_key`, the routes under /v1 ask for it."""
    server = Server(pipeline, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        server.engine.stop()
        server.reading.shutdown()

    app = FastAPI(title="hydra serve", lifespan=lifespan)
    app.state.server = server
    add_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=server.limits.max_body_bytes)
    app.add_middleware(CountRequests, metrics=server.metrics)
    app.include_router(_create_routes(server), prefix="/v1", dependencies=[Depends(_key_check(api_key))])

    @app.get("/health")
    async def health():
        is_running = server.engine.is_running
        return JSONResponse({"status": "ok" if is_running else "stopped"}, 200 if is_running else 503)

    @app.get("/metrics")
    async def metrics():
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _key_check(api_key: str | None) -> Callable:
    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not secrets.compare_digest(given.encode(), api_key.encode()):
            raise APIError(401, "Incorrect API key provided.", code="invalid_api_key")

    return check


def _create_routes(server: Server) -> APIRouter:
    router = APIRouter()

    @router.get("/models")
    async def models():
        return {"object": "list", "data": [server.card()]}

    @router.get("/models/{name:path}")
    async def model(name: str):
        server.check_model(name)
        return server.card()

    @router.post("/chat/completions")
    async def chat(body: ChatBody, request: Request):
        server.check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream=true.", "stream_options")
        events = server.submit(await server.read(server.reader.read_chat, body))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name}
        if not body.stream:
            return await unless_gone(request, events, _whole_answer(events, head))
        first = await unless_gone(request, events, events.next())  # what is wrong shows before the stream begins
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_streamed_answer(events, first, head, include_usage), media_type="text/event-stream")

    @router.post("/images/generations")
    async def generate(body: ImageBody, request: Request):
        server.check_model(body.model)
        events = server.submit(await server.read(server.reader.read_image, body))
        return await unless_gone(request, events, _whole_images(events, body))

    @router.post("/images/edits")
    async def edit(request: Request):
        async with request.form() as form:
            files = [
                await value.read()
                for name, value in form.multi_items()
                if name in ("image", "image[]") and isinstance(value, UploadFile)
            ]
            fields = {name: value for name, value in form.items() if name not in ("image", "image[]")}
        try:
            body = EditBody.model_validate(fields)
        except ValidationError as error:
            raise of_fields(error) from error
        server.check_model(body.model)
        events = server.submit(await server.read(server.reader.read_image, body, files))
        return await unless_gone(request, events, _whole_images(events, body))

    return router


async def _whole_answer(events: Events, head: dict) -> dict:
    answers, ends = [AnswerParts() for _ in events.jobs], [None] * len(events.jobs)
    while (item := await events.next()) is not None:
        index, event = item
        if isinstance(event, Done):
            ends[index] = event
        elif isinstance(event, Drawn):
            answers[index].add_image(await run_in_threadpool(encode_image, event.image))
        else:
            answers[index].text += event.text
    return completion(head, answers, ends)


async def _streamed_answer(events: Events, first: tuple, head: dict, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. The jobs are cancelled if the client does not read to the end."""
    answers, ends, item = [AnswerParts() for _ in events.jobs], [None] * len(events.jobs), first
    try:
        for index in range(len(answers)):
            yield event_line(chunk(head, index, {"role": "assistant", "content": ""}))
        while item is not None:
            index, event = item
            if isinstance(event, Done):
                ends[index] = event
                yield event_line(chunk(head, index, {}, event.reason))
            elif isinstance(event, Drawn):
                image = answers[index].add_image(await run_in_threadpool(encode_image, event.image))
                yield event_line(chunk(head, index, {"images": [image]}))
            elif event.text:
                answers[index].text += event.text
                yield event_line(chunk(head, index, {"content": event.text}))
            item = await events.next()
        if include_usage:
            yield event_line(chunk(head, None, {}) | {"usage": usage(ends)})
        yield "data: [DONE]\n\n"
    except APIError as error:
        yield event_line(error.body())
    finally:
        events.cancel()


async def _whole_images(events: Events, body: ImageBody) -> dict:
    drawn, ends, output_format = {}, [], body.output_format or "png"
    quality = 100 if body.output_compression is None else body.output_compression
    while (item := await events.next()) is not None:
        index, event = item
        if isinstance(event, Done):
            ends.append(event)
        else:
            drawn[index] = event.image
    encoded = [await run_in_threadpool(encode_image, drawn[index], output_format, quality) for index in sorted(drawn)]
    if body.response_format == "url":
        data = [{"url": data_url(image, output_format)} for image in encoded]
    else:
        data = [{"b64_json": image} for image in encoded]
    width, height = drawn[0].size
    num_in, num_out = ends[0].prompt_tokens, sum(end.completion_tokens for end in ends)
    return {
        "created": int(time.time()), "data": data, "output_format": output_format, "size": f"{width}x{height}",
        "usage": {"input_tokens": num_in, "output_tokens": num_out, "total_tokens": num_in + num_out},
    }  # fmt: skip
