"""Samples to the tensors that the model takes."""

import torch
from torch import Tensor, nn

from hydra_hf.modeling import HydraProcessor
from hydra_hf.modeling.grid import get_image_block_ids, pack_images, pack_levels
from hydra_hf.modeling.image_processing_hydra import as_pixel_values

from .sample import Sample
from .tasks import TASKS, visuals_of


def collate(samples: list[Sample], processor: HydraProcessor) -> dict[str, Tensor]:
    """One padded batch: `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (B, L); the images and clips, of any sizes,
    packed in the order of their placeholders: `pixel_values` (total_patches, 3 p p), for `packed_pixel_values`, or stored
    `latent_means` (total_tokens, C), and `image_grid_thw` (num_images, 3), whose t counts frames; `is_generated` (num_images,), true
    for those of the assistant that are not marked `is_given`; where there are edits, `num_sources` (num_images,), see `HydraModel.forward`.
    """
    batch = encode_samples(samples, processor)
    assistant_masks = batch.pop("assistant_masks").bool()
    visuals = [part for sample in samples for part in visuals_of(sample.messages)]
    is_generated = [each for sample in samples for each in generated_visuals(sample)]
    num_sources = [number for sample in samples for number in sources_of(sample)]
    batch["labels"] = text_labels(batch, assistant_masks, torch.tensor(is_generated, dtype=torch.bool))
    if visuals:
        if "latent_mean" in visuals[0]:
            batch["latent_means"] = torch.cat([part["latent_mean"] for part in visuals])
        else:
            batch["pixel_values"] = pack_pixels([part[part["type"]] for part in visuals], processor.patch_size)
        batch["is_generated"] = torch.tensor(is_generated)
    if any(num_sources):
        batch["num_sources"] = torch.tensor(num_sources)
    return batch


def generated_visuals(sample: Sample) -> list[bool]:
    """Which images and clips of a sample are to be generated."""
    return [
        message["role"] == "assistant" and not part.get("is_given", False)
        for message in sample.messages
        for part in visuals_of([message])
    ]


def sources_of(sample: Sample) -> list[int]:
    """How many images directly before it each image of a sample is made from."""
    is_generated = generated_visuals(sample)
    if not TASKS[sample.task].links_source:
        return [0] * len(is_generated)
    return [index if each else 0 for index, each in enumerate(is_generated)]


def pack_pixels(images: list[Tensor], patch_size: int) -> Tensor:
    """Packed levels if all images are levels, otherwise pixels in [-1, 1], for `packed_pixel_values`."""
    if any(image.is_floating_point() for image in images):
        return pack_images([as_pixel_values(image) for image in images], patch_size)[0]
    return pack_levels(images, patch_size)


def encode_samples(samples: list[Sample], processor: HydraProcessor) -> dict[str, Tensor]:
    """What `encode_conversations` gives for all samples; what a reader has encoded is not encoded again."""
    encodings = [sample.encoding or processor.encode_each([sample.messages])[0] for sample in samples]
    return processor.pad_encodings(encodings)


def text_labels(batch: dict[str, Tensor], assistant_masks: Tensor, is_generated: Tensor) -> Tensor:
    """The assistant's text and the start of its first generated image, so that the model learns when to generate one; -100
    elsewhere, from that image on, since what follows would see its noise, and before the last given image of the assistant:
    another sample scores that, see `split_turns`."""
    input_ids = batch["input_ids"]
    in_generated = tokens_of(is_generated, batch["mm_token_type_ids"])
    in_given = tokens_of(~is_generated, batch["mm_token_type_ids"]) & assistant_masks
    from_generated_on = in_generated.cumsum(dim=1) > 0
    up_to_given = in_given.flip(1).cumsum(dim=1).flip(1) > 0
    return input_ids.masked_fill(~assistant_masks | from_generated_on | up_to_given, -100)


def tokens_of(is_chosen: Tensor, mm_token_type_ids: Tensor) -> Tensor:
    """Which tokens (B, L) are those of the chosen images, (num_images,) bool."""
    blocks = get_image_block_ids(mm_token_type_ids)  # k in image k of its row, -1 in text
    counts = blocks.amax(dim=1) + 1
    images = blocks + (counts.cumsum(0) - counts)[:, None]
    return (blocks >= 0) & nn.functional.pad(is_chosen, (0, 1))[images]  # padded, for batches without images
