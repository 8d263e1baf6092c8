"""What a draft should bring."""

from __future__ import annotations

import pytest
from planning import QUICKSTART_TARGET, RATES, job_of

from fastdraft_hf.plan.machines import Measured
from fastdraft_hf.plan.measuring import gains
from fastdraft_hf.recipe import Recipe


def test_gains_are_the_formulas(quickstart: Recipe) -> None:
    found = gains(job_of(quickstart, QUICKSTART_TARGET, Measured(**RATES)))
    assert [g.num_assistant_tokens for g in found] == [1, 2, 3, 5]
    three = found[2]
    assert three.block_efficiency == pytest.approx(1 + 3 * 0.134, abs=1e-3)
    cost = 11_600_832 / 134_515_008
    assert three.mbsu == pytest.approx((1 + 3 * 0.134) / (3 * cost + 1), abs=1e-3)
    one = found[0]
    assert one.speed["ours"] == pytest.approx(one.block_efficiency * 0.0459 / 0.0366)
    # What the run measured at γ = 1 was 1.41 and 0.69.
    assert one.speed["ours"] == pytest.approx(1.41, rel=0.2)
    assert one.speed["transformers"] == pytest.approx(0.69, rel=0.2)
