"""The formulas against what they say of simulated rounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.tune.predict import (
    Acceptance,
    RoundCost,
    acceptance_of_rate,
    expected_acceptance_rate,
    expected_block_efficiency,
    fit_law,
    predict,
)


def simulate(alpha: float, gamma: int, rounds: int = 40_000) -> tuple[float, float]:
    """Return tokens a round and the share of blocks accepted whole, by throwing coins."""
    rng = random.Random(0)
    emitted = whole = 0
    for _ in range(rounds):
        accepted = 0
        while accepted < gamma and rng.random() < alpha:
            accepted += 1
        emitted += accepted + 1
        whole += accepted == gamma
    return emitted / rounds, whole / rounds


@pytest.mark.parametrize(("alpha", "gamma"), [(0.3, 1), (0.45, 3), (0.8, 5), (0.97, 8)])
def test_block_efficiency_is_that_of_simulated_rounds(alpha: float, gamma: int) -> None:
    emitted, whole = simulate(alpha, gamma)
    assert expected_block_efficiency(alpha, gamma) == pytest.approx(emitted, rel=0.01)
    assert Acceptance(alpha).whole(gamma) == pytest.approx(whole, rel=0.03)
    closed = (1 - alpha ** (gamma + 1)) / (1 - alpha)
    assert expected_block_efficiency(alpha, gamma) == pytest.approx(closed)


def test_nothing_and_everything_accepted() -> None:
    assert expected_block_efficiency(0.0, 4) == 1.0
    assert expected_block_efficiency(1.0, 4) == 5.0


@given(st.floats(0, 1), st.integers(1, 12))
def test_an_acceptance_comes_back_from_its_rate(alpha: float, gamma: int) -> None:
    rate = expected_acceptance_rate(alpha, gamma)
    assert expected_acceptance_rate(acceptance_of_rate(rate, gamma), gamma) == pytest.approx(
        rate, abs=1e-9
    )


def test_a_prediction_is_the_speed_of_a_simulated_clock() -> None:
    """Rounds played through with these times take as long as predicted."""
    gamma, alpha = 3, 0.6
    cost = RoundCost(0.004, 0.001, 0.002, {gamma: 0.02}, {gamma: 0.0005})
    rng = random.Random(1)
    clock, tokens, behind = 0.0, 0, False
    for _ in range(40_000):
        clock += 0.004 + (0.002 if behind else 0.0)
        clock += 0.001 * (gamma - 1) + 0.02 + 0.0005
        accepted = 0
        while accepted < gamma and rng.random() < alpha:
            accepted += 1
        tokens += accepted + 1
        behind = accepted == gamma
    assert predict(cost, Acceptance(alpha), gamma) == pytest.approx(tokens / clock, rel=0.01)


def test_measured_efficiencies_are_taken_as_they_are() -> None:
    cost = RoundCost(0.01, 0.01, 0.0, {1: 0.1, 2: 0.1}, {1: 0.0, 2: 0.0})
    found = Acceptance.of_efficiencies({1: 1.5, 2: 1.75})
    assert found.alpha == pytest.approx(0.5)
    assert predict(cost, found, 1) == pytest.approx(1.5 / 0.11)
    assert predict(cost, found, 2) == pytest.approx(1.75 / (0.12 + 0.0 * found.alpha))


def test_the_law_of_a_machine_where_layers_cost() -> None:
    shapes = [(1, 192), (2, 192), (4, 192), (4, 144), (8, 192), (8, 144), (12, 96)]
    law = fit_law([(n, w, 1e-3 * (0.5 + 0.2 * n + 0.0001 * w)) for n, w in shapes])
    assert law.layer == pytest.approx(2e-4)
    assert law.width == pytest.approx(1e-7)
    assert law.over_layers == pytest.approx(11 * 2e-4)
    assert law.explained == pytest.approx(1)
    assert law.holds
    assert "law holds here" in law.sentence()


def test_a_machine_that_differs_says_so() -> None:
    shapes = [(1, 192), (2, 192), (4, 192), (4, 144), (8, 192), (8, 144), (12, 96)]
    law = fit_law([(n, w, 1e-3 * (0.5 + 0.001 * n + 0.01 * w)) for n, w in shapes])
    assert law.holds is False
    assert "differs" in law.sentence()


def test_designs_of_one_width_say_nothing_of_width() -> None:
    law = fit_law([(n, 192, 1e-3 * n) for n in (1, 2, 4, 8)])
    assert law.holds is None
    assert "cannot be told" in law.sentence()
