"""The acceptance that is reckoned with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.plan.acceptance import assumed_acceptance, block_efficiency, chance_of
from fastdraft_hf.recipe import build_recipe


@given(st.floats(0.01, 0.95), st.integers(1, 8))
def test_the_chance_a_place_gives_the_rate(rate: float, gamma: int) -> None:
    chance = chance_of(rate, gamma)
    accepted = sum(chance**k for k in range(1, gamma + 1))
    assert accepted / gamma == pytest.approx(rate, abs=1e-6)
    assert block_efficiency(chance, gamma) == pytest.approx(1 + accepted)
    assert 1 <= block_efficiency(chance, gamma) <= gamma + 1


def test_assumed_acceptance_rises_with_the_budget_between_what_is_known() -> None:
    def rate(tokens: str) -> float:
        recipe = build_recipe(
            {"pretrain": {"sources": [{"kind": "python"}], "max_train_tokens": tokens}}
        )
        return assumed_acceptance(recipe)[0]

    assert rate("64k") == 0.134
    assert rate("640k") == 0.134
    assert 0.134 < rate("30M") < rate("1B") < 0.466
    assert rate("12.5B") == rate("50B") == 0.466
    assert assumed_acceptance(build_recipe({}))[0] == 0.134
