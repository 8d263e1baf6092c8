from __future__ import annotations

from typing import Any

import pytest
from tokenizers import pre_tokenizers

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.target.embedded import build_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", "<|start|>", *ALPHABET, "th", "the", "Ġthe", "12"]
CONTROL, NORMAL = 3, 1


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, *[NORMAL] * (len(TOKENS) - 2)],
        "tokenizer.ggml.merges": ["t h", "th e", "Ġ the", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


def test_ids_special_tokens_and_template_are_the_files() -> None:
    tokenizer = build_tokenizer(fields())
    ids = tokenizer("the the<|end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "Ġthe", "<|end|>"]
    assert len(tokenizer) == len(TOKENS)
    assert [tokenizer.convert_tokens_to_ids(t) for t in TOKENS] == list(range(len(TOKENS)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, 0)
    assert tokenizer.unk_token is None
    assert tokenizer.decode([1, 2, 0], skip_special_tokens=True) == tokenizer.decode([2])
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi"


def test_smollm_splits_digits_and_gpt2_the_default_does_not() -> None:
    unnamed = fields()
    del unnamed["tokenizer.ggml.pre"]
    for given_fields, pieces in ((fields(), 2), (fields(pre="gpt-2"), 1), (unnamed, 1)):
        assert len(build_tokenizer(given_fields)("12")["input_ids"]) == pieces


@pytest.mark.parametrize("changes", [{"model": "llama"}, {"pre": "llama-bpe"}, {"pre": "qwen2"}])
def test_other_kinds_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(FastDraftError, match=next(iter(changes.values())) + ".*not supported"):
        build_tokenizer(fields(**changes))
