"""The first difference of two sequences."""

from __future__ import annotations

import pytest

from fastdraft_hf._sequences import first_difference


@pytest.mark.parametrize(
    ("one", "other", "position"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0)],
)
def test_examples(one: list[int], other: list[int], position: int | None) -> None:
    assert first_difference(one, other) == first_difference(other, one) == position
