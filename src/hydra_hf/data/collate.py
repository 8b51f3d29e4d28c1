"""Samples to the tensors that the model takes."""

import torch
from torch import Tensor

from hydra_hf.modeling import HydraProcessor

from .sample import Sample


def collate(samples: list[Sample], processor: HydraProcessor) -> dict[str, Tensor]:
    """One padded batch: `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (B, L); `pixel_values`
    (num_images, 3, H, W) in the order of their placeholders; `is_generated` (num_images,), true in assistants' turns.

    Raises ValueError if the images differ in size.
    """
    batch = processor.encode_conversations([sample.messages for sample in samples])
    assistant_masks = batch.pop("assistant_masks").bool()
    images, is_generated = [], []
    for sample in samples:
        for message in sample.messages:
            parts = [part["image"] for part in message["content"] if part["type"] == "image"]
            images += parts
            is_generated += [message["role"] == "assistant"] * len(parts)
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"Images of one batch must have one size, got {sorted({tuple(i.shape) for i in images})}.")
    batch["labels"] = text_labels(batch, assistant_masks, processor)
    if images:
        batch["pixel_values"] = torch.stack(images)
        batch["is_generated"] = torch.tensor(is_generated)
    return batch


def text_labels(batch: dict[str, Tensor], assistant_masks: Tensor, processor: HydraProcessor) -> Tensor:
    """The assistant's text; -100 elsewhere, and after a generated image, since what follows would see its noise."""
    input_ids, is_image = batch["input_ids"], batch["mm_token_type_ids"] == 1
    vision_tokens = processor.tokenizer.convert_tokens_to_ids(
        [processor.vision_start_token, processor.vision_end_token]
    )
    is_vision = is_image | torch.isin(input_ids, torch.tensor(vision_tokens))
    after_generated = (is_image & assistant_masks).cumsum(dim=1) > 0
    return input_ids.masked_fill(~assistant_masks | is_vision | after_generated, -100)
