"""What /metrics tells Prometheus."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Engine


class EngineCollector(Collector):
    """The engine's own numbers. Rows over forwards is the mean size of a batch."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        engine = self.engine
        yield GaugeMetricFamily("hydra_waiting", "Answers and images that wait", len(engine.waiting))
        yield GaugeMetricFamily("hydra_active", "Answers and images in work", len(engine.active))
        for name, text, label, counts in (
            ("hydra_forwards", "Forwards of the model", "kind", engine.num_forwards),
            ("hydra_rows", "Rows in these forwards", "kind", engine.num_rows),
            ("hydra_jobs", "Answers and images that ended", "end", engine.num_ended),
        ):
            family = CounterMetricFamily(name, text, labels=[label])
            for value, count in list(counts.items()):
                family.add_metric([value.lower()], count)
            yield family


class Metrics:
    """The numbers of one server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.requests = Counter("hydra_requests", "Requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "hydra_request_seconds", "Time to the end of a response", ["route"], registry=self.registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class CountRequests:
    """Counts and times every request, streams to their end. Not starlette's BaseHTTPMiddleware, which hides disconnects."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), "disconnected"

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            route = scope["route"].path if "route" in scope else "unknown"
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
