"""Rows that training reads."""

from __future__ import annotations

import pytest

from fastdraft_hf.plan.training import mean_rows
from fastdraft_hf.recipe import Recipe


def test_rows_that_align_reads_have_their_own_length(quickstart: Recipe) -> None:
    rows = mean_rows(quickstart)
    assert (rows["pretrain"], rows["continue"]) == (256, 256)
    assert rows["align"] == pytest.approx(243, rel=0.1)  # 730 tokens a step of three, measured
