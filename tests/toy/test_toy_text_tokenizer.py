import pytest
from transformers import AutoTokenizer

from hydra_hf.toy import text_tokenizer
from hydra_hf.toy.text_tokenizer import SPECIAL_TOKENS, extend_toy_tokenizer, train_toy_tokenizer, words_of


CORPUS = [
    "a red circle left of the blue square",
    "What is this?\nTwo cats and one dog.",
    "How many apples are there? 3",
    "a T-shirt, the dog's",
]


LEAST_SIZE = 7 + 1 + 256 + 28  # special tokens, line break, bytes, words


@pytest.fixture(scope="module", params=[LEAST_SIZE, 1024])
def tokenizer(request):
    return train_toy_tokenizer(CORPUS, request.param)


def tokens(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_every_word_is_one_token_wherever_it_stands(tokenizer):
    text_of_words = (
        "a red circle left of the blue square what is this two cats and one dog how many apples are there 3"
    )
    for word in [*text_of_words.split(), "user", "assistant", "system"]:
        (token_id,) = tokenizer(word)["input_ids"]
        for text in (f"red {word}", f"red\n{word}", f"<|im_start|>{word}", f"<|vision_end|>{word.upper()}"):
            assert tokenizer(text)["input_ids"][-1] == token_id, text


def test_a_chat_turn_has_no_token_to_spare(tokenizer):
    expected = ["<|im_start|>", "Ġuser", "\n", "Ġwhat", "Ġis", "Ġthis", "?", "<|im_end|>", "\n"]
    assert tokens(tokenizer, "<|im_start|>user\nWhat is this?<|im_end|>\n") == expected


@pytest.mark.parametrize(
    "text",
    [
        "red circle",
        " red",
        "  two  spaces ",
        "a\nb\n\n c\r\n\td",
        "zebra über 日本 😀 \u2060 \x00",
        "it's 12,5 % <|not_special|> |> x",
        "<|im_start|>user\ncat<|im_end|>\n<|vision_start|><|image_pad|><|vision_end|> dog<|endoftext|>",
        "",
        " ",
        "\n",
    ],
)
def test_lower_case_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_answer_is_decoded_without_stray_spaces(tokenizer):
    ids = tokenizer("<|im_start|>assistant\nRed circle, two cats.<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids[3:], skip_special_tokens=True) == "red circle, two cats."
    assert tokenizer.decode(ids, skip_special_tokens=True) == "assistant\nred circle, two cats."


def test_unknown_words_are_spelled_and_never_special(tokenizer):
    ids = tokenizer("zebra <|im_en d|> <|IM_END|> 日本")["input_ids"]
    assert None not in ids
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_the_special_tokens_are_qwens_by_name(tokenizer):
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.bos_token is None
    for token in SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def test_ids_are_dense_and_within_the_asked_size():
    for vocab_size in (LEAST_SIZE, 350, 1024):
        tokenizer = train_toy_tokenizer(CORPUS, vocab_size)
        assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
        assert len(tokenizer) <= vocab_size


def test_a_size_too_small_for_the_words_is_refused():
    with pytest.raises(ValueError, match=f"expected at least {LEAST_SIZE} "):
        train_toy_tokenizer(CORPUS, LEAST_SIZE - 1)


def test_training_twice_gives_the_same_tokenizer():
    first, second = train_toy_tokenizer(CORPUS), train_toy_tokenizer(CORPUS)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_saving_and_loading_keeps_ids_text_and_padding(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nTwo zebras\n left<|im_end|>\n"
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.decode(reloaded(text)["input_ids"]) == text.lower()
    assert set(reloaded(text)) == {"input_ids", "attention_mask"}
    assert reloaded(["a", "a red"], padding=True)["attention_mask"] == [[0, 1], [1, 1]]
    assert reloaded.get_vocab() == tokenizer.get_vocab()


def test_an_extended_tokenizer_keeps_ids_and_reads_new_words_as_one_token_each(tokenizer, tmp_path):
    text = "<|im_start|>user\na red zebra moves,\nthen the dog's\n<|video_pad|>"
    extended = extend_toy_tokenizer(tokenizer, ["A zebra moves,\nthen a cat"])
    extended.save_pretrained(tmp_path)
    for larger in (extended, AutoTokenizer.from_pretrained(tmp_path)):
        vocab = larger.get_vocab()
        assert {token: vocab[token] for token in tokenizer.get_vocab()} == tokenizer.get_vocab()
        assert sorted(vocab.values()) == list(range(len(tokenizer) + 4)) == list(range(len(larger)))
        assert tokens(larger, "red zebra moves, then") == ["Ġred", "Ġzebra", "Ġmoves", ",", "Ġthen"]
        assert larger.decode(larger(text)["input_ids"]) == text
        assert larger("two cats\n")["input_ids"] == tokenizer("two cats\n")["input_ids"]
        assert larger.all_special_ids == tokenizer.all_special_ids


def test_a_special_token_that_is_missing_is_added(monkeypatch):
    monkeypatch.setattr(text_tokenizer, "SPECIAL_TOKENS", SPECIAL_TOKENS[:-1])
    tokenizer = train_toy_tokenizer(CORPUS)
    monkeypatch.undo()
    assert "<|video_pad|>" not in tokenizer.get_vocab()
    extended = extend_toy_tokenizer(tokenizer, [])
    assert extended("<|video_pad|>")["input_ids"] == [len(tokenizer)]
    assert len(tokenizer) in extended.all_special_ids


def test_words_are_without_punctuation_and_case():
    assert words_of(["A cat's 3", "a CAT."]) == {"a", "cat", "s", "3"}
