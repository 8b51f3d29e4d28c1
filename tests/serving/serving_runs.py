"""Requests run by the engine, turn by turn, and images compared."""

import queue

import numpy as np
from PIL import Image

from hydra_hf import HydraPipeline
from hydra_hf.serving.engine import Engine, Job
from hydra_hf.serving.jobs import Done, Drawn, Text


NAME = "hydra-tiny"  # under which the embedded checkpoint is served


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
