from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from fastdraft_hf.eval.expected import (
    Continuation,
    expected_acceptance,
    expected_acceptance_rate,
    log_probabilities,
)

ALPHAS = st.lists(st.floats(0, 1), min_size=5, max_size=9)


def test_log_probabilities_are_those_of_the_texts_own_tokens(
    tiny_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = tiny_model()
    text = Continuation("t", (40, 41, 42), (50, 51))
    found = log_probabilities(model, text, temperature=0.5)
    assert found.shape == (2, model.config.vocab_size)
    with torch.no_grad():
        for place, prefix in enumerate(([40, 41, 42], [40, 41, 42, 50])):
            logits = model(input_ids=torch.tensor([prefix])).logits[0, -1]
            expected = torch.log_softmax(logits / 0.5, -1)
            torch.testing.assert_close(found[place], expected, atol=1e-4, rtol=1e-4)


def test_acceptance_is_what_two_distributions_share() -> None:
    target = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    draft = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [0.0, 0.0, 1.0]])
    found = expected_acceptance(target.log(), draft.log())
    assert found.tolist() == pytest.approx([1.0, 0.6, 0.0])


def test_a_rate_by_hand() -> None:
    # Two rounds of two fit: 0.5 + 0.5·0.4 and 0.4 + 0.4·1 of four drafted tokens.
    assert expected_acceptance_rate([[0.5, 0.4, 1.0]], 2) == pytest.approx(1.5 / 4)
    assert expected_acceptance_rate([[0.5], [1.0, 1.0]], 2) == 1.0  # the first is too short
    assert expected_acceptance_rate([], 2) == 0.0


@given(st.lists(ALPHAS, min_size=1, max_size=3), st.integers(1, 5))
def test_a_rate_lies_below_the_best_and_falls_with_longer_rounds(
    alphas: list[list[float]], gamma: int
) -> None:
    rate = expected_acceptance_rate(alphas, gamma)
    assert 0 <= rate <= max(max(text) for text in alphas) + 1e-12
    constant = [[0.7] * 9]
    assert expected_acceptance_rate(constant, gamma) == pytest.approx(
        sum(0.7**k for k in range(1, gamma + 1)) / gamma
    )
