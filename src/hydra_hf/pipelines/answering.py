"""Questions about images and clips, answered in batches."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, LogitsProcessor
from transformers.video_utils import VideoInput

from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..modeling.processing_hydra import HydraProcessor
from .arguments import check_integer, check_processor, check_texts


@torch.no_grad()
def answer(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    images: list[Image.Image | VideoInput],
    questions: list[str],
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy answers to one question about each image or clip; what is not an image of PIL is a clip, as a file or as frames.

    Raises ValueError if the lists differ in length, a question is empty or longer than the context, the processor does not
    belong to the model, or the model computes NaN.
    """
    check_processor(model, processor)
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
    if not isinstance(images, list | tuple):
        raise ValueError(f"Got images={images!r:.100}, expected a list.")
    if isinstance(questions, str):
        raise ValueError(f"Got questions={questions!r:.100}, expected a list of strings.")
    if len(images) != len(check_texts("questions", questions)):
        raise ValueError(f"Got {len(images)} images and {len(questions)} questions, expected as many of each.")
    if empty := [index for index, question in enumerate(questions) if not question.strip()]:
        raise ValueError(f"The questions {empty} are empty.")
    kinds = [_kind_of(index, image, processor) for index, image in enumerate(images)]
    turns = [
        [{"type": kind, kind: image}, {"type": "text", "text": question}]
        for kind, image, question in zip(kinds, images, questions)
    ]
    return answer_conversations(
        model, processor, [[{"role": "user", "content": parts}] for parts in turns], max_new_tokens
    )


@torch.no_grad()
def answer_conversations(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    conversations: list[list[dict]],
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy answers to conversations, lists of messages of the chat template, which end with the user's turn."""
    inputs = encode_conversations(model, processor, conversations)
    _check_lengths(inputs["attention_mask"], max_new_tokens, model.config.text_config.max_position_embeddings)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=[FiniteLogits()])
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _kind_of(index: int, value, processor: HydraProcessor) -> str:
    """ "image" or "video". Raises ValueError for what is neither, and for clips that the model does not read."""
    if isinstance(value, Image.Image):
        return "image"
    if processor.video_token is None or not isinstance(value, str | Path | list | tuple | np.ndarray | Tensor):
        expected = "an image of PIL" if processor.video_token is None else "an image of PIL or a clip"
        raise ValueError(f"Got a {type(value).__name__} as images[{index}], expected {expected}.")
    return "video"


def encode_turns(
    model: HydraForConditionalGeneration, processor: HydraProcessor, turns: list[list[dict]]
) -> BatchFeature:
    """The model's inputs for user turns, each a list of parts, up to where the assistant's turn begins; padded."""
    return encode_conversations(model, processor, [[{"role": "user", "content": parts}] for parts in turns])


def encode_conversations(
    model: HydraForConditionalGeneration, processor: HydraProcessor, conversations: list[list[dict]]
) -> BatchFeature:
    """The model's inputs for conversations, up to where the assistant's turn begins; padded."""
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True},
    ).to(model.device, model.dtype)  # fmt: skip


def _check_lengths(attention_mask: Tensor, max_new_tokens: int, context: int) -> None:
    for index, length in enumerate(attention_mask.sum(-1).tolist()):
        if length + max_new_tokens > context:
            raise ValueError(
                f"Question {index} takes {length} tokens with its image, expected at most {context - max_new_tokens}: the"
                f" context has {context}, and max_new_tokens={max_new_tokens} of them are for the answer."
            )


class FiniteLogits(LogitsProcessor):
    """Raises ValueError for NaN, which greedy decoding would turn into the first token of the vocabulary."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise ValueError("The logits that the model computed are not finite: its weights are damaged.")
        return scores
