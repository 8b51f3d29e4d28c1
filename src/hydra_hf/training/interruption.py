"""SIGTERM and Ctrl-C: a run ends after its step, with a checkpoint."""

import os
import signal
import threading
import time

import torch
from accelerate import Accelerator


SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_OF_ONE = 3.0  # a launcher repeats the terminal's signal within this time


class TrainingInterruptedError(Exception):
    """A run that was asked to stop and has saved its state; `signum` is the signal."""

    def __init__(self, stage: str, step: int, signum: int):
        super().__init__(
            f"{stage} stopped at step {step} by {signal.Signals(signum).name}; the same command resumes it."
        )
        self.signum = signum


class StopRequest:
    """A context in which SIGINT and SIGTERM are noted and do not end the process. A second, later signal ends it."""

    def __init__(self):
        self.signum, self.received_at, self.process = 0, 0.0, os.getpid()
        self.previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        is_repeated = self.signum and time.monotonic() - self.received_at > SECONDS_OF_ONE
        if is_repeated or os.getpid() != self.process:  # a loader worker has inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.signum:
            self.signum, self.received_at = number, time.monotonic()

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process has received, 0 if none. Every process must call this once in a step."""
        if accelerator.num_processes == 1:
            return self.signum
        signals = accelerator.gather(torch.tensor([self.signum], device=accelerator.device))
        self.signum = int(signals.max())
        return self.signum
