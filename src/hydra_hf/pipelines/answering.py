"""Questions about images, answered in batches."""

import torch
from PIL import Image

from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..modeling.processing_hydra import HydraProcessor


@torch.no_grad()
def answer(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    images: list[Image.Image],
    questions: list[str],
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy answers to one question about each image. ValueError for lists of different lengths or an empty question."""
    if len(images) != len(questions) or not questions:
        raise ValueError(
            f"Got {len(images)} images and {len(questions)} questions, expected as many, and at least one."
        )
    if empty := [index for index, question in enumerate(questions) if not question.strip()]:
        raise ValueError(f"The questions {empty} are empty.")
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions)
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, model.dtype)  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
