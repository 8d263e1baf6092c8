"""Ids by words are those of the tokenizer itself, for the real target's and for other families."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from fastdraft_hf.data import python_source
from fastdraft_hf.data.word_cache import WordCache

# As Llama 3's and Qwen's tokenizers cut.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (
        "def f(x): return it's 12 + 345 \n\n  we'll see é ü ñ the café\r\n\t\tif x:\n        pass"
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


FAMILIES = {
    "gpt2": lambda: train(pre.ByteLevel(add_prefix_space=False)),
    "digits": lambda: train(
        pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    ),
    "llama3": lambda: train(
        pre.Sequence(
            [
                pre.Split(Regex(LLAMA3), "isolated"),
                pre.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "qwen": lambda: train(
        pre.Sequence(
            [
                pre.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
                pre.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizers.NFC(),
    ),
}
CACHES: dict[str, tuple[WordCache, Tokenizer]] = {}


def pair(family: str, target: Any = None) -> tuple[WordCache, Tokenizer]:
    if family not in CACHES:
        made = target.backend_tokenizer if target is not None else FAMILIES[family]()
        plain = Tokenizer.from_str(made.to_str())
        plain.encode_special_tokens = True
        CACHES[family] = (WordCache(Tokenizer.from_str(made.to_str())), plain)
    return CACHES[family]


PIECES = (
    "a|A|é|e\u0301|ß|ſ|K|'s|'S|'ll|'| |  |\n|\r\n|\t|\u00a0|\u2003|\u2028|\x1c|\x0b|1|23|4567|½|²|Ⅷ"
    "|٣|中文|かな|한국|🙂|\u200d|_|__init__|(|):|..."
    "|— |“|<|end|>|<|endoftext|>|Ω|я|\ufeff|\U0001e900"
)
pieces = st.sampled_from(PIECES.split("|"))


@pytest.mark.parametrize("family", [*FAMILIES, "target"])
@given(texts=st.lists(st.one_of(st.lists(pieces, max_size=12).map("".join), st.text()), max_size=4))
def test_ids_are_the_tokenizers_own(family: str, texts: list[str], target_tokenizer: Any) -> None:
    cache, plain = pair(family, target_tokenizer if family == "target" else None)
    assert cache.by_words
    expected = [encoding.ids for encoding in plain.encode_batch(texts, add_special_tokens=False)]
    assert cache.encode(texts) == expected


def test_real_code_and_prose(target_tokenizer: Any) -> None:
    texts = [text for text in python_source.documents() if text.strip()][::40]
    expected = target_tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
    assert len(texts) > 10
    assert pair("target", target_tokenizer)[0].encode(texts) == expected["input_ids"]


def test_a_special_token_in_a_text_stays_text(target_tokenizer: Any) -> None:
    cache, _ = pair("target", target_tokenizer)
    (ids,) = cache.encode(["one<|endoftext|>two"])
    assert 0 not in ids
    assert target_tokenizer.decode(ids) == "one<|endoftext|>two"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: setattr(t, "pre_tokenizer", pre.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", pre.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: t.add_tokens([AddedToken("wide", lstrip=True)]),
    ],
)
def test_what_is_not_understood_goes_to_the_library(spoil: Any) -> None:
    made = FAMILIES["gpt2"]()
    spoil(made)
    cache = WordCache(Tokenizer.from_str(made.to_str()))
    assert not cache.by_words
    texts = ["Some wide text, twice", "", " and more"]
    assert cache.encode(texts) == [made.encode(t, add_special_tokens=False).ids for t in texts]


def test_added_tokens_are_found_in_texts() -> None:
    made = FAMILIES["gpt2"]()
    made.add_tokens(["<think>"])
    cache = WordCache(Tokenizer.from_str(made.to_str()))
    assert cache.by_words
    texts = ["we <think>see</think>", "we see"]
    assert cache.encode(texts) == [made.encode(t, add_special_tokens=False).ids for t in texts]


def test_the_cache_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdraft_hf.data import word_cache

    cache, plain = WordCache(FAMILIES["gpt2"]()), pair("gpt2")[1]
    monkeypatch.setattr(word_cache, "_MOST_WORDS", 2)
    for text in ("one two three four", "five one six", "one two"):
        assert cache.encode([text]) == [plain.encode(text, add_special_tokens=False).ids]
    assert len(cache._known) == 2
