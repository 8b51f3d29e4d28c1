"""Samples of different lengths in rows without padding, as many tokens at once as a budget allows."""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

import torch
from torch import Tensor

from hydra_hf.modeling.grid import count_images, image_grids, split_images


def count_micro_batches(bundle: dict, tasks: Iterable[str], max_tokens: int) -> int:
    """The smallest number of parts of a bundle, see `split_bundle`, none of which has more than `max_tokens` tokens.

    Raises ValueError if the longest samples of all tasks have more than that together.
    """
    lengths = {task: sample_lengths(bundle[task]) for task in tasks}
    number = -(-sum(map(sum, lengths.values())) // max_tokens)
    while sum(longest_row(own, number) for own in lengths.values()) > max_tokens:
        if number >= max(map(len, lengths.values())):
            longest = {task: max(own) for task, own in lengths.items()}
            raise ValueError(
                f"micro_batch_tokens={max_tokens} cannot hold the longest sample of every task: {longest} tokens."
            )
        number += 1
    return number


def split_bundle(bundle: dict, tasks: Iterable[str], number: int) -> list[dict]:
    """A bundle of padded batches as `number` of packed ones, with a row of every task in each.

    A task with fewer samples than parts repeats its shortest one; its `num_samples` is then 0, and it does not count.
    """
    parts = [{**bundle, "rows": {}} for _ in range(number)]
    for task in tasks:
        batch, lengths = bundle[task], sample_lengths(bundle[task])
        shortest = lengths.index(min(lengths))
        for part, members in zip(parts, deal(lengths, number)):
            num_samples = len(members) if batch["num_samples"] else 0
            members = members or [shortest]
            part[task] = {**pack(batch, members), "num_samples": num_samples}
            part["rows"][task] = [bundle["rows"][task][member] for member in members]
    return parts


def sample_lengths(batch: dict[str, Tensor]) -> list[int]:
    """Tokens of each sample of a padded batch, images included."""
    return batch["attention_mask"].sum(dim=1).tolist()


def longest_row(lengths: Sequence[int], number: int) -> int:
    """Tokens of the longest of `number` rows; more rows never make it longer."""
    return max(sum(lengths[index] for index in row) for row in deal(lengths, number))


def deal(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Indices of samples in `number` rows of about the same length: the longest first, each to the shortest row."""
    rows = [(0, row) for row in range(number)]
    members = [[] for _ in range(number)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length, row = heappop(rows)
        members[row].append(index)
        heappush(rows, (length + lengths[index], row))
    return [sorted(row) for row in members]


def pack(batch: dict[str, Tensor], members: Sequence[int]) -> dict[str, Tensor]:
    """Some samples of a padded batch as one row (1, L) without padding, and their images.

    `document_ids` (1, L) say which sample a token belongs to; there is no `attention_mask`. The first token of a sample is not
    a label: the token before it belongs to another sample.
    """
    own = batch["attention_mask"].bool()
    packed = {
        name: torch.cat([batch[name][member][own[member]] for member in members])[None]
        for name in ("input_ids", "mm_token_type_ids", "labels")
    }
    lengths = own[list(members)].sum(dim=1)
    packed["document_ids"] = torch.arange(len(members)).repeat_interleave(lengths)[None]
    packed["labels"][0, lengths.cumsum(dim=0) - lengths] = -100
    if "image_grid_thw" in batch:
        packed |= images_of_samples(batch, members)
    return packed


def images_of_samples(batch: dict[str, Tensor], members: Sequence[int]) -> dict[str, Tensor]:
    """The images of some samples, pixels or stored latents, with what is known of each of them; {} if they have none."""
    counts = count_images(batch["mm_token_type_ids"])
    grids = image_grids(batch["image_grid_thw"])
    images = torch.arange(len(grids)).split(counts)
    chosen = torch.cat([images[member] for member in members]).tolist()
    if not chosen:
        return {}
    name = "pixel_values" if "pixel_values" in batch else "latent_means"
    patches = split_images(batch[name], grids)
    per_image = [key for key in ("image_grid_thw", "is_generated", "num_sources") if key in batch]
    return {
        name: torch.cat([patches[image] for image in chosen]),
        **{key: batch[key][chosen] for key in per_image},
    }
