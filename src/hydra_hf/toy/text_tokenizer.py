"""The text tokenizer of the embedded model: byte-level BPE with every word of a small corpus as one token."""

import json
import re
from collections import Counter

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)  # with Qwen's names, so that one chat template serves both
LINE_BREAK = "\n"
CHAT_WORDS = "user assistant system"


def train_toy_tokenizer(corpus: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """
    A lower-case tokenizer in which every word of `corpus` is one token, the same at the start of a text, after a line
    break, after a special token and after a space. Other words become pieces; nothing is lost except upper case.

    Raises ValueError if `vocab_size` is too small for the words.
    """
    lines = _lines([*corpus, CHAT_WORDS])
    tokenizer = _untrained_tokenizer(models.BPE())
    words = _words(tokenizer, lines)
    num_fixed = len(SPECIAL_TOKENS) + len([LINE_BREAK]) + len(pre_tokenizers.ByteLevel.alphabet())
    num_words = sum(len(word) > 1 for word in words)
    if num_fixed + num_words > vocab_size:
        raise ValueError(f"Got {vocab_size=}, expected at least {num_fixed + num_words} for {num_words} words.")

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len([LINE_BREAK]) - num_words,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]
    vocab = pieces["vocab"]
    for word in words:
        vocab.setdefault(word, len(vocab))
    return _fast_tokenizer(vocab, pieces["merges"])


def extend_toy_tokenizer(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> PreTrainedTokenizerFast:
    """
    A tokenizer in which every word of `texts` is one token, too, and which has all `SPECIAL_TOKENS`. Tokens keep their
    ids, and new ones follow the last; a model needs `resize_token_embeddings`.
    """
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    vocab = tokenizer.get_vocab()  # with the line break, whose id would move behind the new words otherwise
    for token in [*SPECIAL_TOKENS, *_words(tokenizer.backend_tokenizer, _lines(texts))]:
        vocab.setdefault(token, len(vocab))
    return _fast_tokenizer(vocab, merges)


def _fast_tokenizer(vocab: dict[str, int], merges: list[list[str]]) -> PreTrainedTokenizerFast:
    # a word in the vocabulary is matched whole: merges alone would also need all its intermediate pieces
    merges = [tuple(merge) for merge in merges]
    tokenizer = _untrained_tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    # a line break is a token of its own, so that a line starts like a text
    tokenizer.add_tokens([AddedToken(LINE_BREAK, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _untrained_tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    # always one space in front, and one removed again: with ByteLevel's own add_prefix_space, " cat" would become "cat"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(" ")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    starts = "|".join([LINE_BREAK, *(token.replace("|", r"\|") for token in SPECIAL_TOKENS)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(Regex(f"(?<={starts}) "), ""), decoders.Strip(" ", left=1, right=0)]
    )
    return tokenizer


def words_of(texts: list[str]) -> set[str]:
    """Every word of the texts, in lower case: the `known_words` of a processor."""
    return set(re.findall(r"\w+", " ".join(texts).lower()))


def _lines(texts: list[str]) -> list[str]:
    return [line for text in texts for line in text.splitlines() if line]


def _words(tokenizer: Tokenizer, lines: list[str]) -> list[str]:
    """The pre-tokens of the corpus in byte-level characters, frequent ones first."""
    counts = Counter(
        word
        for line in lines
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(line))
    )
    return sorted(counts, key=lambda word: (-counts[word], word))
