from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.drafts.vocabulary import check_same_vocabulary


def saved_with_swapped_tokens(tokenizer: Any, folder: Path, first: str, second: str) -> Any:
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(data), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def test_the_same_vocabulary(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    check_same_vocabulary(tiny_tokenizer, AutoTokenizer.from_pretrained(tmp_path), "draft")


def test_two_tokens_swapped(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # Same tokens, same length: only the maps differ.
    other = saved_with_swapped_tokens(tiny_tokenizer, tmp_path, "a", "b")
    a = tiny_tokenizer.get_vocab()["a"]
    b = tiny_tokenizer.get_vocab()["b"]
    message = rf"my-draft: .*2 tokens differ; 'a': {a} in the target, {b} in the draft"
    with pytest.raises(FastDraftError, match=message):
        check_same_vocabulary(tiny_tokenizer, other, "my-draft")


def test_one_token_more(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<extra>"])
    with pytest.raises(FastDraftError, match=r"1 tokens differ; '<extra>': none in the target"):
        check_same_vocabulary(tiny_tokenizer, other, "draft")
    with pytest.raises(
        FastDraftError, match=r"1 tokens differ; '<extra>': 288 in the target, none"
    ):
        check_same_vocabulary(other, tiny_tokenizer, "draft")


def test_another_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.eos_token = "<|endoftext|>"
    with pytest.raises(FastDraftError, match="ends on token 0, the target on 2"):
        check_same_vocabulary(tiny_tokenizer, other, "draft")
