"""The formulas against simulated rounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.tune.predict import acceptance_of_rate, expected_block_efficiency


@pytest.mark.parametrize(("alpha", "gamma"), [(0.3, 1), (0.45, 3), (0.8, 5), (0.97, 8)])
def test_block_efficiency_is_that_of_simulated_rounds(alpha: float, gamma: int) -> None:
    rng, emitted, rounds = random.Random(0), 0, 40_000
    for _ in range(rounds):
        accepted = 0
        while accepted < gamma and rng.random() < alpha:
            accepted += 1
        emitted += accepted + 1
    assert expected_block_efficiency(alpha, gamma) == pytest.approx(emitted / rounds, rel=0.01)
    closed = (1 - alpha ** (gamma + 1)) / (1 - alpha)
    assert expected_block_efficiency(alpha, gamma) == pytest.approx(closed)


@given(st.floats(0, 1), st.integers(1, 12))
def test_an_acceptance_comes_back_from_its_rate(alpha: float, gamma: int) -> None:
    tokens = expected_block_efficiency(alpha, gamma)
    found = acceptance_of_rate((tokens - 1) / gamma, gamma)
    assert expected_block_efficiency(found, gamma) == pytest.approx(tokens, abs=1e-8)
