"""Dialogues in text and images: what the model answers next."""

import torch

from ..modeling.chat_messages import AnswerParts
from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..modeling.processing_hydra import HydraProcessor
from .answering import FiniteLogits
from .arguments import check_integer, check_processor


@torch.no_grad()
def reply(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    messages: list[dict],
    *,
    max_new_tokens: int = 32,
    **drawing,
) -> AnswerParts:
    """The answer to a dialogue, the most likely text and the images between it: the `content` of the assistant's message.

    Args:
        messages: up to a turn of the user; images of earlier answers are in them, as parts.
        drawing: the settings of images, see `generate_interleaved`.

    Raises ValueError if the processor does not belong to the model, a message is not readable, the dialogue is longer than
    the context, or the model computes NaN.
    """
    check_processor(model, processor)
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)
    length, context = inputs["input_ids"].shape[1], model.config.text_config.max_position_embeddings
    if length + max_new_tokens > context:
        raise ValueError(
            f"The dialogue takes {length} tokens with its images, expected at most {context - max_new_tokens}: the context has"
            f" {context}, and max_new_tokens={max_new_tokens} of them are for the answer."
        )
    output = model.generate(
        **inputs, generation_mode="interleaved", do_sample=False, max_new_tokens=max_new_tokens,
        logits_processor=[FiniteLogits()], **drawing,
    )  # fmt: skip
    return processor.post_process_multimodal_output(output)[0]
