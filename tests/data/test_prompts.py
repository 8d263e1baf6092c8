from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import prompts
from fastdraft_hf.data.prompts import (
    answer_suffix,
    chat_ids,
    code_instructions,
    free_prefix,
    magpie_prefix,
)
from fastdraft_hf.data.requests import Request, requests_for


@pytest.mark.parametrize(
    "instruction",
    ["Write a poem about rain.", "What is 12 times 12?", "def f(x):\n    return x", "Ça va ?"],
)
def test_magpie_pieces_make_the_chat(target_tokenizer: Any, instruction: str) -> None:
    ids = tuple(target_tokenizer(instruction, add_special_tokens=False)["input_ids"])
    whole = magpie_prefix(target_tokenizer) + ids + answer_suffix(target_tokenizer)
    assert whole == chat_ids(target_tokenizer, instruction)


def test_what_magpie_starts_and_ends_with(target_tokenizer: Any) -> None:
    assert target_tokenizer.decode(magpie_prefix(target_tokenizer)).endswith("<|im_start|>user\n")
    suffix = target_tokenizer.decode(answer_suffix(target_tokenizer))
    assert suffix == "<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_chat_template(tiny_tokenizer: Any) -> None:
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    assert chat_ids(plain, "the cat") == tuple(plain("the cat")["input_ids"])
    with pytest.raises(FastDraftError, match="Magpie needs a chat template"):
        magpie_prefix(plain)


def test_a_template_that_drops_the_user(tiny_tokenizer: Any) -> None:
    deaf = copy.deepcopy(tiny_tokenizer)
    deaf.chat_template = "hello"
    with pytest.raises(FastDraftError, match="drops the user's words"):
        answer_suffix(deaf)


def test_free_text_starts_with_the_separator(target_tokenizer: Any, tiny_tokenizer: Any) -> None:
    assert free_prefix(target_tokenizer) == (0,)
    assert target_tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert free_prefix(tiny_tokenizer) == (0,)


def test_free_text_without_a_separator() -> None:
    class Bare:
        bos_token_id: int | None = 7
        eos_token_id: int | None = 8

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    bare: Any = Bare()
    assert free_prefix(bare) == (7,)
    bare.bos_token_id = None
    assert free_prefix(bare) == (8,)
    bare.eos_token_id = None
    with pytest.raises(FastDraftError, match="neither BOS nor EOS"):
        free_prefix(bare)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=6), st.lists(st.integers(0, 2**32 - 1)))
def test_prompt_hash_is_of_the_prompt_only(first: list[int], second: list[int]) -> None:
    a = Request(0, tuple(first), 0.0, 1, 8, "a")
    b = Request(9, tuple(first), 1.0, 2, 9, "b")
    c = Request(0, tuple(second), 0.0, 1, 8, "a")
    assert a.prompt_hash == b.prompt_hash
    assert (a.prompt_hash == c.prompt_hash) == (first == second)
    assert len(a.prompt_hash) == 16


@given(
    st.lists(st.tuples(st.integers(0, 9)), max_size=20),
    st.lists(st.sampled_from([0.0, 0.6, 1.0]), min_size=1, max_size=4),
    st.integers(0, 10**9),
)
def test_requests(texts: list[tuple[int]], temperatures: list[float], seed: int) -> None:
    made = requests_for(texts, temperatures=temperatures, max_new_tokens=5, seed=seed, source="s")
    assert [r.index for r in made] == list(range(len(texts)))
    assert [r.prompt_ids for r in made] == texts
    assert [r.temperature for r in made] == [
        temperatures[i % len(temperatures)] for i in range(len(texts))
    ]
    assert len({r.seed for r in made}) == len(made)
    assert all(0 <= r.seed < 2**31 for r in made)
    assert made == requests_for(
        texts, temperatures=temperatures, max_new_tokens=5, seed=seed, source="s"
    )


def test_code_instructions_follow_their_seed(
    heads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "function_heads", lambda: iter(heads))
    first = code_instructions(0)
    assert first == code_instructions(0)
    other = code_instructions(1)
    assert first != other
    assert sorted(first) == sorted(other)
    assert len(set(first)) == len(first) > 1000
    assert all(t.startswith("Complete this Python function:\n\n```python\n") for t in first)
