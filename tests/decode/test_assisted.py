from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from fastdraft_hf._ties import Margin, greedy_margin
from fastdraft_hf.decode.assisted import decode, set_draft_length
from fastdraft_hf.decode.records import DecodingRecord

TinyModel = Callable[..., LlamaForCausalLM]

PROMPTS = st.lists(st.integers(3, 287), min_size=1, max_size=12)
GAMMAS = st.integers(1, 5)


def run(
    target: Any, prompt: list[int], draft: Any = None, gamma: int = 0, **given: Any
) -> DecodingRecord:
    fields: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "seed": 0, **given}
    return decode(
        target, prompt, task="t", key="k", draft=draft, num_assistant_tokens=gamma, **fields
    )


def check_rounds(record: DecodingRecord, gamma: int) -> None:
    """Every pass of the target emits what it accepted and one token of its own."""
    assert sum(accepted + 1 for _, accepted in record.rounds) == len(record.tokens)
    assert record.target_passes == len(record.rounds)
    assert all(0 <= accepted <= drafted <= gamma for drafted, accepted in record.rounds)
    assert record.drafted == sum(drafted for drafted, _ in record.rounds)
    assert record.accepted == sum(accepted for _, accepted in record.rounds)
    assert record.num_assistant_tokens == gamma


@given(PROMPTS, GAMMAS)
@settings(max_examples=25)
def test_greedy_output_does_not_depend_on_the_draft(
    target: LlamaForCausalLM,
    stranger: LlamaForCausalLM,
    neighbour: LlamaForCausalLM,
    prompt: list[int],
    gamma: int,
) -> None:
    alone = run(target, prompt)
    for draft in (stranger, neighbour):
        assisted = run(target, prompt, draft, gamma)
        assert assisted.tokens == alone.tokens
        check_rounds(assisted, gamma)


def test_the_neighbour_is_accepted_in_part(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM
) -> None:
    """What keeps the test above from comparing drafts that are never or always accepted."""
    records = [run(target, [3 * n, 7], neighbour, 3) for n in range(1, 20)]
    rate = sum(r.accepted for r in records) / sum(r.drafted for r in records)
    assert 0.02 < rate < 0.98


@given(PROMPTS, GAMMAS, st.floats(0.3, 2), st.integers(0, 99))
@settings(max_examples=15)
def test_sampled_rounds_add_up_and_a_seed_decides_them(
    target: LlamaForCausalLM,
    neighbour: LlamaForCausalLM,
    prompt: list[int],
    gamma: int,
    temperature: float,
    seed: int,
) -> None:
    first = run(target, prompt, neighbour, gamma, temperature=temperature, seed=seed)
    check_rounds(first, gamma)
    again = run(target, prompt, neighbour, gamma, temperature=temperature, seed=seed)
    assert (again.tokens, again.rounds) == (first.tokens, first.rounds)


def test_the_draft_keeps_its_length_whatever_happened_before(
    target: LlamaForCausalLM, stranger: LlamaForCausalLM
) -> None:
    """transformers' default schedule writes a new length back; ours must not."""
    for gamma in (5, 2, 4):
        record = run(target, [40, 41], stranger, gamma)
        assert stranger.generation_config.num_assistant_tokens == gamma
        assert [drafted for drafted, _ in record.rounds[:-5]] == [gamma] * (len(record.rounds) - 5)
    set_draft_length(stranger, 7)
    assert stranger.generation_config.num_assistant_tokens == 7
    assert stranger.generation_config.num_assistant_tokens_schedule == "constant"
    assert stranger.generation_config.assistant_confidence_threshold == 0.0


def test_the_greedy_margin_is_first_minus_second(target: LlamaForCausalLM) -> None:
    ids = [40, 41, 42]
    with torch.no_grad():
        logits = target(input_ids=torch.tensor([ids])).logits[0, -1]
    ordered = logits.sort(descending=True).values
    margin = greedy_margin(target, ids)
    assert margin.margin == pytest.approx((ordered[0] - ordered[1]).item(), abs=1e-5)
    assert margin.largest == pytest.approx(logits.abs().max().item())
    assert Margin(0.0039 * 20, 20.0).tie
    assert not Margin(0.0041 * 20, 20.0).tie


@pytest.mark.parametrize(
    ("path", "gamma", "drafts"),
    [
        ("transformers", 0, False),
        ("transformers", 3, True),
        ("ours", 3, True),
        ("ours", 0, True),
        ("prompt-lookup", 3, False),
    ],
)
def test_every_path_tells_when_its_first_token_came(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM, path: Any, gamma: int, drafts: bool
) -> None:
    prompt = [40, 41, 42, 43] * 4
    record = run(target, prompt, neighbour if drafts else None, gamma, path=path)
    assert record.tokens == run(target, prompt).tokens
    assert record.first_token_seconds is not None
    assert 0 < record.first_token_seconds < record.seconds
    assert (record.path, record.num_assistant_tokens) == (path, gamma)


@given(PROMPTS, GAMMAS)
@settings(max_examples=15)
def test_prompt_lookup_writes_what_the_target_writes(
    target: LlamaForCausalLM, prompt: list[int], gamma: int
) -> None:
    record = run(target, prompt * 2, gamma=gamma, path="prompt-lookup")
    alone = run(target, prompt * 2)
    assert record.tokens == alone.tokens
    assert len(record.tokens) <= 12  # stock copies past the end
    assert record.target_passes == len(record.rounds)
    assert all(0 <= accepted <= drafted <= gamma for drafted, accepted in record.rounds)
