"""The first difference of two sequences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._sequences import first_difference


@pytest.mark.parametrize(
    ("one", "other", "position"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0)],
)
def test_examples(one: list[int], other: list[int], position: int | None) -> None:
    assert first_difference(one, other) == first_difference(other, one) == position


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_everything_before_is_equal(one: list[int], other: list[int]) -> None:
    position = first_difference(one, other)
    if position is None:
        assert one == other
    else:
        assert one[:position] == other[:position]
        assert one[position : position + 1] != other[position : position + 1]
