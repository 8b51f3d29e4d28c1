"""Samples of a padded batch as rows without padding: nothing is lost, nothing doubled, no row over the budget."""

import pytest
import torch
from torch import Tensor

from hydra_hf.data.collate import collate
from hydra_hf.data.packing import count_micro_batches, deal, longest_row, pack, split_bundle
from hydra_hf.data.sample import Sample


def sample(*parts: str | tuple[int, int], answer: str | tuple[int, int] = "cat") -> Sample:
    """A question of texts and images (height, width), and its answer."""

    def content(part: str | tuple[int, int]) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image", "image": torch.full((3, *part), part[0] / 100)}

    messages = [
        {"role": "user", "content": list(map(content, parts))},
        {"role": "assistant", "content": [content(answer)]},
    ]
    return Sample(task="edit", messages=messages)


SAMPLES = [
    sample((8, 8), "what is in", (16, 8)), sample("what"), sample("a cat", answer=(16, 16)), sample((8, 16), "what", answer=(8, 8)),
]  # fmt: skip


@pytest.fixture
def batch(tiny_processor) -> dict[str, Tensor]:
    return collate(SAMPLES, tiny_processor)


def test_a_packed_row_has_the_tokens_labels_and_images_of_its_samples_alone(batch, tiny_processor):
    members = [0, 2, 3]
    packed = pack(batch, members)
    alone = [collate([SAMPLES[member]], tiny_processor) for member in members]
    for name in ("input_ids", "mm_token_type_ids", "labels"):
        assert torch.equal(packed[name], torch.cat([one[name] for one in alone], dim=1))
    for name in ("pixel_values", "image_grid_thw", "is_generated"):
        assert torch.equal(packed[name], torch.cat([one[name] for one in alone]))
    lengths = [one["input_ids"].shape[1] for one in alone]
    assert packed["document_ids"].tolist() == [[0] * lengths[0] + [1] * lengths[1] + [2] * lengths[2]]
    assert "attention_mask" not in packed


def test_a_row_of_text_alone_has_no_images(batch):
    assert set(pack(batch, [1])) == {"input_ids", "mm_token_type_ids", "labels", "document_ids"}


def test_the_first_token_of_a_sample_is_no_label(batch):
    packed = pack({**batch, "labels": batch["input_ids"]}, [0, 1])
    starts = packed["document_ids"][0].diff(prepend=torch.tensor([-1])) == 1
    assert (packed["labels"][0] == -100).tolist() == starts.tolist()


@pytest.mark.parametrize(
    "lengths, number, rows",
    [
        ([10, 1, 5, 4], 2, [[0], [1, 2, 3]]),
        ([3, 3, 3, 3], 2, [[0, 2], [1, 3]]),
        ([2, 1], 3, [[0], [1], []]),
        ([7], 1, [[0]]),
    ],
)
def test_samples_are_dealt_to_rows_of_about_the_same_length(lengths, number, rows):
    assert deal(lengths, number) == rows


def test_more_rows_never_make_the_longest_longer():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(1, 100, (12,), generator=generator).tolist()
        longest = [longest_row(lengths, number) for number in range(1, 14)]
        assert longest == sorted(longest, reverse=True)
        assert longest[-1] == max(lengths)


def bundle_of(lengths: dict[str, list[int]]) -> dict:
    """Samples of text, token n the n-th of the task's; padded on the left."""
    bundle = {"step": 3, "rows": {task: [10 + index for index in range(len(own))] for task, own in lengths.items()}}
    for task, own in lengths.items():
        mask = torch.tensor([[0] * (max(own) - length) + [1] * length for length in own])
        ids = torch.arange(len(own))[:, None] * mask
        bundle[task] = {
            "input_ids": ids, "labels": ids, "attention_mask": mask, "mm_token_type_ids": 0 * mask, "num_samples": len(own),
        }  # fmt: skip
    return bundle


LENGTHS = {"text": [5, 2, 2], "understand": [6, 3, 3, 1]}


@pytest.mark.parametrize("max_tokens, number", [(22, 1), (21, 2), (12, 2), (11, 3)])
def test_parts_are_as_few_as_the_budget_allows(max_tokens, number):
    """22 tokens; 5 | 4 and 7 | 6 of two parts; 5 | 2 | 2 and 6 | 4 | 3 of three."""
    bundle = bundle_of(LENGTHS)
    assert count_micro_batches(bundle, LENGTHS, max_tokens) == number
    parts = split_bundle(bundle, LENGTHS, number)
    assert max(sum(part[task]["input_ids"].shape[1] for task in LENGTHS) for part in parts) <= max_tokens


def test_samples_that_do_not_fit_together_are_refused():
    with pytest.raises(
        ValueError, match=r"micro_batch_tokens=10 cannot hold .*: \{'text': 5, 'understand': 6\} tokens"
    ):
        count_micro_batches(bundle_of(LENGTHS), LENGTHS, 10)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
def test_every_sample_is_in_one_part_and_counts_once(number):
    parts, seen = split_bundle(bundle_of(LENGTHS), LENGTHS, number), {task: [] for task in LENGTHS}
    assert len(parts) == number
    for part in parts:
        assert part["step"] == 3
        for task in LENGTHS:
            rows, batch = part["rows"][task], part[task]
            assert torch.unique_consecutive(batch["input_ids"][0]).tolist() == [row - 10 for row in rows]
            assert len(rows) == max(1, batch["num_samples"])
            seen[task] += rows[: batch["num_samples"]]
    assert {task: sorted(rows) for task, rows in seen.items()} == {
        "text": [10, 11, 12],
        "understand": [10, 11, 12, 13],
    }


def test_a_blank_batch_stays_blank():
    bundle = bundle_of({"text": [4]})
    bundle["text"]["num_samples"] = 0
    assert [part["text"]["num_samples"] for part in split_bundle(bundle, ["text"], 2)] == [0, 0]


def test_kept_latents_are_packed_as_pixels_are(batch):
    pixels = batch["pixel_values"]
    kept = {name: value for name, value in batch.items() if name != "pixel_values"} | {"latent_means": pixels}
    members = [2, 0]
    assert torch.equal(pack(kept, members)["latent_means"], pack(batch, members)["pixel_values"])
