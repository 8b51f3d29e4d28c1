"""Several samples in one row: each is computed as if it were alone."""

import pytest
import torch
from test_ragged import GRIDS, ROWS, batch_of, prompt
from tiny import hydra_model, in_one_row
from torch import Tensor

from hydra_hf import HydraForConditionalGeneration
from hydra_hf.modeling.grid import num_tokens
from hydra_hf.modeling.masks import document_positions


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SAMPLES = [*ROWS, ()]  # images of four samples, the last has none


def padded() -> dict[str, Tensor]:
    return batch_of(*SAMPLES)


def packed() -> dict[str, Tensor]:
    """The samples of `padded` in one row."""
    batch = padded()
    own, row = batch.pop("attention_mask").bool(), in_one_row([prompt(*images) for images in SAMPLES])
    assert torch.equal(batch["input_ids"][own], row["input_ids"][0])
    del batch["position_ids"]
    return {**batch, **row, "labels": batch["labels"][own][None]}


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def model(request) -> HydraForConditionalGeneration:
    return hydra_model(request.param)


def without(batch: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in names}


def test_positions_start_again_with_each_document():
    ids = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_packed_samples_give_what_padded_ones_give(model):
    own = padded()["attention_mask"].bool()
    a, b = model(**without(padded(), "labels")), model(**without(packed(), "labels"))
    torch.testing.assert_close(b.logits[0], a.logits[own], **CLOSE)
    torch.testing.assert_close(b.velocity, a.velocity, **CLOSE)
    a, b = model(**padded()), model(**packed())
    torch.testing.assert_close(b.language_loss, a.language_loss, **CLOSE)
    torch.testing.assert_close(b.flow_loss, a.flow_loss, **CLOSE)


def test_gradients_of_packed_samples_are_those_of_padded_ones():
    gradients = []
    for batch in (padded(), packed()):
        model = hydra_model().train()
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {name.split(".")[1] for name in gradients[0]} >= {"language_model", "vision_tower", "layers"}
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("document", range(4))
def test_a_change_in_one_document_changes_nothing_in_another(model, document):
    batch = without(packed(), "labels")
    own = batch["document_ids"][0] == document
    changed = {**batch, "input_ids": batch["input_ids"].clone(), "latents": batch["latents"].clone()}
    first = int(own.nonzero()[0])
    changed["input_ids"][0, first] = 9  # the first token, which all of the document sees
    images = [index for row in SAMPLES for index in row]
    tokens = torch.tensor([index in SAMPLES[document] for index in images]).repeat_interleave(
        torch.tensor([num_tokens(GRIDS[index]) for index in images])
    )
    changed["latents"][tokens] *= -1
    before, after = (
        model.model(**without(inputs, "is_generated", "velocity_target")).last_hidden_state[0]
        for inputs in (batch, changed)
    )
    assert torch.equal(before[~own], after[~own])
    assert (before - after)[own].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("attn_implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()  # flex attention has no gradient on a CPU
def test_every_attention_implementation_keeps_documents_apart(attn_implementation):
    a, b = hydra_model()(**packed()), hydra_model(attn_implementation=attn_implementation)(**packed())
    for name in ("logits", "velocity", "language_loss", "flow_loss"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name), atol=1e-4, rtol=1e-4)


def test_a_row_of_one_document_is_read_as_one_without_documents(model):
    ids = torch.tensor([prompt(0)])
    batch = {name: value for name, value in batch_of((0,)).items() if name in ("latents", "sigma", "image_grid_thw")}
    expected = model(input_ids=ids, **batch).logits
    torch.testing.assert_close(model(input_ids=ids, document_ids=0 * ids, **batch).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 4, dtype=torch.long)}, "leave attention_mask out"),
        ({"document_ids": torch.zeros(1, 3, dtype=torch.long)}, r"document_ids \(1, 3\) must be \(1, 4\)"),
    ],
)
def test_documents_that_do_not_fit_are_refused(model, changes, message):
    ids = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": ids, "document_ids": torch.tensor([[0, 0, 1, 1]]), **changes})
