"""The text of an answer as it comes is the text of all its tokens, and ends before a stop string."""

import pytest

from hydra_hf.serving.text_stream import TextStream


TEXT = "a red circle, 2 b\u00fcrgers \U0001f600 and two blue squares."


def streamed(tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream, parts = TextStream(tokenizer, stop), []
    for token in tokenizer(text).input_ids:
        parts.append(stream.push(token))
        if stream.is_stopped:
            break
    return [part for part in (*parts, stream.finish()) if part], stream.is_stopped


def test_text_comes_in_parts_without_half_characters(tiny_tokenizer):
    parts, is_stopped = streamed(tiny_tokenizer, TEXT)
    assert "".join(parts) == tiny_tokenizer.decode(tiny_tokenizer(TEXT).input_ids)
    assert len(parts) > 5
    assert "\ufffd" not in "".join(parts)
    assert not is_stopped


def test_half_a_character_at_the_end_is_shown_as_by_decode(tiny_tokenizer):
    tokens = tiny_tokenizer("a \U0001f600").input_ids[:-1]
    stream = TextStream(tiny_tokenizer)
    parts = [stream.push(token) for token in tokens]
    assert "".join([*parts, stream.finish()]) == tiny_tokenizer.decode(tokens)
    assert "\ufffd" in tiny_tokenizer.decode(tokens)


def test_special_tokens_are_no_text(tiny_tokenizer):
    parts, _ = streamed(tiny_tokenizer, "<|im_start|>a cat<|im_end|>")
    assert "".join(parts) == "a cat"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("two",), TEXT[: TEXT.index("two")]), ((".", "circle"), "a red "), (("squares!",), TEXT), (("d two",), TEXT[: TEXT.index("d two")])],
)  # fmt: skip
def test_text_ends_before_the_first_stop_string(tiny_tokenizer, stop, expected):
    parts, is_stopped = streamed(tiny_tokenizer, TEXT, stop)
    assert "".join(parts) == expected
    assert is_stopped == (expected != TEXT)


def test_what_may_become_a_stop_string_is_held_back(tiny_tokenizer):
    stream = TextStream(tiny_tokenizer, ["red cat"])
    parts = [stream.push(token) for token in tiny_tokenizer("a red c").input_ids]
    assert "".join(parts) == "a "
    assert stream.finish() == "red c"
