"""The engine: one thread that owns the model. Each turn runs what all active jobs ask for, one forward for each kind of work.

waiting jobs -> active jobs -> work -> batches -> results -> active jobs -> ... -> events
Jobs join and leave between turns, so a new answer or image does not wait until those before it are finished.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..pipelines.pipeline_hydra import HydraPipeline
from .batching import create_batches
from .jobs import ChatRequest, Done, ImageRequest, chat_job, image_job
from .work import Step, Work


logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """More jobs wait than the engine takes."""


class EngineStoppedError(Exception):
    """The engine does not run any more."""


@dataclass(eq=False)
class Job:
    """A request, who hears its events, and how far it is.

    Args:
        emit: called on the engine's thread with each event, and last with a `Done` or with the exception that ended the job.
    """

    request: ChatRequest | ImageRequest
    emit: Callable[[object], None]
    is_cancelled: bool = False
    generator: Generator[Work, object, None] | None = None
    work: Work | None = None

    def cancel(self) -> None:
        """Ends the job before its next forward; nothing is emitted any more."""
        self.is_cancelled = True


class Engine:
    """Runs jobs for as long as it is started.

    Args:
        max_batch_size: most jobs that run at once; the others wait.
        max_queue: most jobs that wait.
    """

    def __init__(self, pipeline: HydraPipeline, max_batch_size: int = 16, max_queue: int = 1024):
        self.pipeline, self.max_batch_size, self.max_queue = pipeline, max_batch_size, max_queue
        self.batches = create_batches(pipeline.model)
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []
        self.num_forwards, self.num_rows, self.num_ended = Counter(), Counter(), Counter()  # by kind of work; by end
        self._condition, self._is_stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="hydra-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the current turn; jobs that are not finished get `EngineStoppedError`."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
        self._thread.join()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all jobs or none. Raises QueueFullError or EngineStoppedError."""
        with self._condition:
            if not self.is_running:
                raise EngineStoppedError("The engine does not run.")
            if len(self.waiting) + len(jobs) > self.max_queue:
                raise QueueFullError(f"{len(self.waiting)} requests are waiting, at most {self.max_queue} can.")
            self.waiting.extend(jobs)
            self._condition.notify_all()

    def _run(self) -> None:
        try:
            while self._wait_for_jobs():
                self.turn()
        finally:
            with self._condition:
                self._is_stopping = True
                jobs = [*self.active, *self.waiting]
                self.active, self.waiting = [], deque()
            for job in jobs:
                self._end(job, EngineStoppedError("The server is stopping."))

    def _wait_for_jobs(self) -> bool:
        """Whether there is something to do; False to stop."""
        with self._condition:
            self._condition.wait_for(lambda: self._is_stopping or self.waiting or self.active)
            return not self._is_stopping

    @torch.no_grad()
    def turn(self) -> None:
        """One forward for each kind of work that the active jobs ask for."""
        for job in self._admitted():
            create = chat_job if isinstance(job.request, ChatRequest) else image_job
            job.generator = create(self.pipeline, job.request, job.emit)
            self.active.append(job)
            self._advance(job, None)
        for kind, batch in self.batches.items():
            groups: dict[object, list[Job]] = {}
            for job in self._alive():
                if type(job.work) is kind:
                    groups.setdefault(batch.key(job.work), []).append(job)
            for jobs in groups.values():
                self._run_together(kind, batch, jobs)
        self.batches[Step].forget([job.work for job in self.active if type(job.work) is Step])

    def _admitted(self) -> Iterator[Job]:
        """Jobs that waited longest, for as long as there is room."""
        while len(self.active) < self.max_batch_size:
            with self._condition:
                if not self.waiting:
                    return
                job = self.waiting.popleft()
            if job.is_cancelled:
                self._end(job, "cancelled")
            else:
                yield job

    def _alive(self) -> list[Job]:
        for job in [job for job in self.active if job.is_cancelled]:
            self._end(job, "cancelled")
        return list(self.active)

    def _run_together(self, kind: type[Work], batch, jobs: list[Job]) -> None:
        self.num_forwards[kind.__name__] += 1
        self.num_rows[kind.__name__] += len(jobs)
        try:
            results = batch.run([job.work for job in jobs])
        except Exception as error:  # such as out of memory: the other jobs continue
            logger.exception("A forward of %d jobs failed.", len(jobs))
            for job in jobs:
                self._end(job, error)
            return
        for job, result in zip(jobs, results, strict=True):
            self._advance(job, result)

    def _advance(self, job: Job, result: object) -> None:
        """Gives a job the result of its work, and keeps what it asks for next."""
        try:
            job.work = job.generator.send(result)
        except StopIteration:
            self._end(job, "done")
        except ValueError as error:  # of the request
            self._end(job, error)
        except Exception as error:
            logger.exception("A job failed.")
            self._end(job, error)

    def _end(self, job: Job, end: Exception | str) -> None:
        self.num_ended["failed" if isinstance(end, Exception) else end] += 1
        if job.generator is not None:
            job.generator.close()
        if job in self.active:
            self.active.remove(job)
        job.work = None
        if isinstance(end, Exception) and not job.is_cancelled:
            job.emit(end)


__all__ = ["Done", "Engine", "EngineStoppedError", "Job", "QueueFullError"]
