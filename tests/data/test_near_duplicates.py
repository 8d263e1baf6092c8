from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.data.near_duplicates import RUN, NearDuplicates

texts = st.lists(st.lists(st.integers(0, 3), max_size=14), max_size=12)


def runs(ids: list[int]) -> set[tuple[int, ...]]:
    length = min(RUN, len(ids))
    return {tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)} if ids else set()


def similarity(first: list[int], second: list[int]) -> float:
    a, b = runs(first), runs(second)
    return len(a & b) / len(a | b) if a or b else 0.0


@given(texts, st.sampled_from([0.1, 0.5, 0.8, 1.0]))
def test_near_duplicates_are_near_by_the_plain_definition(
    found: list[list[int]], threshold: float
) -> None:
    index = NearDuplicates(threshold)
    kept: list[list[int]] = []
    for ids in found:
        number = index.find_or_add(ids)
        if number is not None:
            assert similarity(ids, kept[number]) >= threshold
        elif ids:
            kept.append(ids)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_pairs_at_the_threshold_are_found(threshold: float) -> None:
    """Half of the pairs a little above, half a little below it, of long random texts."""
    source = random.Random(0)
    above = below = 0
    for _ in range(150):
        first = [source.randrange(10_000) for _ in range(240)]
        # One token in the middle is in RUN runs of both texts.
        second = list(first)
        wanted = threshold + source.choice([-0.05, 0.03])
        while similarity(first, second) > wanted:
            second[source.randrange(len(second))] = source.randrange(10_000)
        index = NearDuplicates(threshold, seed=source.randrange(100))
        index.find_or_add(first)
        is_near = similarity(first, second) >= threshold
        assert (index.find_or_add(second) == 0) == is_near
        above, below = above + is_near, below + (not is_near)
    assert min(above, below) > 40
