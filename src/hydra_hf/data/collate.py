"""Samples to the tensors that the model takes."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hydra_hf.modeling import HydraProcessor
from hydra_hf.modeling.grid import pack_images
from hydra_hf.modeling.image_processing_hydra import as_pixel_values

from .sample import Sample
from .tasks import images_of


def collate(samples: list[Sample], processor: HydraProcessor) -> dict[str, Tensor]:
    """One padded batch: `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (B, L); the images, of any sizes, packed
    in the order of their placeholders: `pixel_values` (total_patches, 3 p p), for `as_pixel_values`, or stored `latent_means` (total_tokens, C),
    and `image_grid_thw` (num_images, 3); `is_generated` (num_images,), true for images of the assistant.
    """
    batch = encode_samples(samples, processor)
    assistant_masks = batch.pop("assistant_masks").bool()
    images, is_generated = [], []
    for message in (message for sample in samples for message in sample.messages):
        parts = images_of([message])
        images += parts
        is_generated += [message["role"] == "assistant"] * len(parts)
    batch["labels"] = text_labels(batch, assistant_masks)
    if images:
        if "latent_mean" in images[0]:
            batch["latent_means"] = torch.cat([part["latent_mean"] for part in images])
        else:
            batch["pixel_values"], _ = pack_pixels([part["image"] for part in images], processor.patch_size)
        batch["is_generated"] = torch.tensor(is_generated)
    return batch


def pack_pixels(images: list[Tensor], patch_size: int) -> tuple[Tensor, Tensor]:
    """`pack_images` in uint8 if all images are levels, otherwise in floats in [-1, 1]."""
    if any(image.is_floating_point() for image in images):
        images = [as_pixel_values(image) for image in images]
    return pack_images(images, patch_size)


def encode_samples(samples: list[Sample], processor: HydraProcessor) -> dict[str, Tensor]:
    """What `encode_conversations` gives for all samples, padded on the left; a sample that its reader encoded is not encoded
    again."""
    encodings = [sample.encoding or processor.encode_conversations([sample.messages]) for sample in samples]
    grids = [encoding["image_grid_thw"] for encoding in encodings if "image_grid_thw" in encoding]
    values = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "assistant_masks": 0}
    batch = {
        name: pad_sequence([encoding[name][0] for encoding in encodings], True, value, padding_side="left")
        for name, value in (values | {"mm_token_type_ids": 0}).items()
    }
    return batch | ({"image_grid_thw": torch.cat(grids)} if grids else {})


def text_labels(batch: dict[str, Tensor], assistant_masks: Tensor) -> Tensor:
    """The assistant's text and the start of its first image, so that the model learns when to generate one; -100 elsewhere, and
    from that image on, since what follows would see its noise."""
    input_ids, is_image = batch["input_ids"], batch["mm_token_type_ids"] == 1
    from_generated_on = (is_image & assistant_masks).cumsum(dim=1) > 0
    return input_ids.masked_fill(~assistant_masks | from_generated_on, -100)
