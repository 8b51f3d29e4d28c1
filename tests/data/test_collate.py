import pytest
import torch
from torch import Tensor

from hydra_hf.data.collate import collate
from hydra_hf.data.sample import Sample
from hydra_hf.modeling import HydraProcessor


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(value: float = 0.0, height: int = 8, width: int = 16) -> dict:
    """Two patches, so two tokens after the time token."""
    return {"type": "image", "image": torch.full((3, height, width), value)}


def chat(*turns: tuple[str, list[dict]], task: str = "understand") -> Sample:
    return Sample(task=task, messages=[{"role": role, "content": content} for role, content in turns])


def drawn(batch: dict[str, Tensor], processor: HydraProcessor, row: int = 0) -> str:
    """Tokens of a row, and under them those that are labels, a dot where there is none."""
    names = {"<|im_start|>": "[", "<|im_end|>": "]", "<|vision_start|>": "<", "<|vision_end|>": ">",
             "<|image_pad|>": "#", "<|endoftext|>": "_", "\n": "/"}  # fmt: skip
    tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][row].tolist())
    tokens = [names.get(token, token.removeprefix("Ġ")) for token in tokens]
    labels = batch["labels"][row]
    assert all(label in (-100, token) for label, token in zip(labels.tolist(), batch["input_ids"][row].tolist()))
    marks = [token if label >= 0 else "." for token, label in zip(tokens, labels.tolist())]
    width = [max(len(token), len(mark)) for token, mark in zip(tokens, marks)]
    lines = [" ".join(item.ljust(w) for item, w in zip(items, width)).rstrip() for items in (tokens, marks)]
    return "\n" + "\n".join(lines)


def test_the_assistants_text_is_labelled_and_nothing_else(tiny_processor):
    sample = chat(("user", [image(), text("what is in")]), ("assistant", [text("a cat")]), ("user", [text("what")]),
                  ("assistant", [text("two")]))  # fmt: skip
    batch = collate([sample], tiny_processor)
    assert (
        drawn(batch, tiny_processor)
        == """
[ user / < # # # > what is in ] / [ assistant / a cat ] / [ user / what ] / [ assistant / two ] /
. .    . . . . . . .    .  .  . . . .         . a cat ] . . .    . .    . . . .         . two ] ."""
    )


def test_the_start_of_a_generated_image_is_its_only_label(tiny_processor):
    sample = chat(("user", [text("a cat")]), ("assistant", [image()]), task="generate")
    batch = collate([sample], tiny_processor)
    assert (
        drawn(batch, tiny_processor)
        == """
[ user / a cat ] / [ assistant / < # # # > ] /
. .    . . .   . . . .         . < . . . . . ."""
    )


def test_text_up_to_a_generated_image_is_labelled_and_after_it_is_not(tiny_processor):
    sample = chat(("user", [text("draw a cat")]), ("assistant", [text("a cat"), image(), text("two")]), ("user", [text("what")]),
                  ("assistant", [text("dog")]), task="edit")  # fmt: skip
    batch = collate([sample], tiny_processor)
    assert (
        drawn(batch, tiny_processor)
        == """
[ user / draw a cat ] / [ assistant / a cat < # # # > two ] / [ user / what ] / [ assistant / dog ] /
. .    . .    . .   . . . .         . a cat < . . . . .   . . . .    . .    . . . .         . .   . ."""
    )


def test_after_a_given_image_of_the_assistant_text_is_labelled_again(tiny_processor):
    given = image() | {"is_given": True}
    sample = chat(("user", [text("draw a cat")]), ("assistant", [text("a cat"), given, text("two")]), ("user", [text("what")]),
                  ("assistant", [text("dog"), image(), text("red")]), task="edit")  # fmt: skip
    other = chat(("user", [text("what")]), ("assistant", [text("cat")]), task="text")
    batch = collate([sample, other], tiny_processor)
    assert (
        drawn(batch, tiny_processor)
        == """
[ user / draw a cat ] / [ assistant / a cat < # # # > two ] / [ user / what ] / [ assistant / dog < # # # > red ] /
. .    . .    . .   . . . .         . . .   . . . . > two ] . . .    . .    . . . .         . dog < . . . . .   . ."""
    )
    assert drawn(batch, tiny_processor, row=1).endswith("cat ] .")
    assert batch["is_generated"].tolist() == [False, True]


def test_a_generated_image_silences_its_own_row_only(tiny_processor):
    samples = [
        chat(("user", [text("a cat")]), ("assistant", [image()]), task="generate"),
        chat(("user", [image(), text("what is in")]), ("assistant", [text("cat")])),
    ]
    batch = collate(samples, tiny_processor)
    generated, answered = """
_ _ [ user / a cat ] / [ assistant / < # # # > ] /
. . . .    . . .   . . . .         . < . . . . . .""", """
[ user / < # # # > what is in ] / [ assistant / cat ] /
. .    . . . . . . .    .  .  . . . .         . cat ] ."""  # fmt: skip
    assert drawn(batch, tiny_processor, row=0) == generated
    assert drawn(batch, tiny_processor, row=1) == answered
    assert batch["attention_mask"].diff(dim=1).ne(0).sum(1).tolist() == [1, 0]  # padded once, on the left


def test_images_come_in_the_order_of_their_placeholders(tiny_processor):
    samples = [
        chat(("user", [image(0.1), image(0.2), text("what")]), ("assistant", [image(0.3)]), task="edit"),
        chat(("user", [text("a cat")]), ("assistant", [text("two")]), task="text"),
        chat(("user", [image(0.4), text("what")]), ("assistant", [text("cat")])),
    ]
    batch = collate(samples, tiny_processor)
    assert batch["pixel_values"].shape == (4 * 2, 3 * 8 * 8)
    torch.testing.assert_close(batch["pixel_values"][::2, 0], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert batch["image_grid_thw"].tolist() == [[1, 1, 2]] * 4
    assert batch["is_generated"].tolist() == [False, False, True, False]
    assert batch["mm_token_type_ids"].sum(1).tolist() == [9, 0, 3]  # a time token and two patches each


def test_a_batch_without_images_has_no_pixels(tiny_processor):
    batch = collate([chat(("user", [text("what")]), ("assistant", [text("cat")]), task="text")], tiny_processor)
    assert set(batch) == {"input_ids", "attention_mask", "mm_token_type_ids", "labels"}


def test_every_tensor_of_a_batch_has_its_shape(tiny_processor):
    batch = collate([chat(("user", [image()]), ("assistant", [text("cat")]))] * 2, tiny_processor)
    shape = batch["input_ids"].shape
    assert all(batch[name].shape == shape for name in ("attention_mask", "mm_token_type_ids", "labels"))


def test_images_of_different_sizes_are_packed_each_with_its_own_placeholders(tiny_processor):
    sample = chat(("user", [image(0.1, height=8), text("a"), image(0.2, height=16)]), ("assistant", [text("cat")]))
    batch = collate([sample], tiny_processor)
    assert (
        drawn(batch, tiny_processor)
        == """
[ user / < # # # > a < # # # # # > ] / [ assistant / cat ] /
. .    . . . . . . . . . . . . . . . . . .         . cat ] ."""
    )
    assert batch["image_grid_thw"].tolist() == [[1, 1, 2], [1, 2, 2]]
    torch.testing.assert_close(batch["pixel_values"].mean(1), torch.tensor([0.1] * 2 + [0.2] * 4))


def test_a_special_token_in_a_users_text_is_neither_image_nor_label(tiny_processor):
    sample = chat(("user", [text("<|image_pad|><|im_end|>")]), ("assistant", [text("<|image_pad|> cat")]), task="text")
    batch = collate([sample], tiny_processor)
    assert batch["mm_token_type_ids"].sum() == 0
    assert "pixel_values" not in batch


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task='paint'"):
        Sample(task="paint", messages=[])
