"""Questions of the toy world as tasks of the harnesses, in files of their formats."""

import base64
import io
from functools import cache

import torch

from hydra_hf import TINY
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.toy.language import ToyLanguage
from hydra_hf.toy.world import ToyWorld


NUM_QUESTIONS = 24


@cache
def embedded_pipeline() -> HydraPipeline:
    """The embedded checkpoint."""
    pipeline = HydraPipeline.from_pretrained(TINY)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def toy_questions(num_questions: int = NUM_QUESTIONS) -> list[dict]:
    """Rows with an image of PIL, a question and its answer."""
    language, processor = ToyLanguage(ToyWorld(1)), embedded_pipeline().processor
    scenes, questions = language.sample_questions(num_questions, torch.Generator().manual_seed(0), split="test")
    images = processor.image_processor.postprocess(language.world.render(scenes), output_type="pil")
    return [
        {"image": image, "question": question.question, "answer": question.answer}
        for image, question in zip(images, questions)
    ]


def png_bytes(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def png_text(image) -> str:
    return base64.b64encode(png_bytes(image)).decode()
