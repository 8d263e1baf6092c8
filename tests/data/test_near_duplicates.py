from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.data.near_duplicates import (
    HASHES,
    MISSED,
    RUN,
    NearDuplicates,
    hashed_runs,
    missed,
    rows_per_band,
)

texts = st.lists(st.lists(st.integers(0, 3), max_size=14), max_size=12)


def runs(ids: list[int]) -> set[tuple[int, ...]]:
    length = min(RUN, len(ids))
    return {tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)} if ids else set()


def similarity(first: list[int], second: list[int]) -> float:
    a, b = runs(first), runs(second)
    return len(a & b) / len(a | b) if a or b else 0.0


@given(texts, st.sampled_from([0.1, 0.5, 0.8, 1.0]))
def test_what_is_called_near_is_near_by_the_plain_definition(
    found: list[list[int]], threshold: float
) -> None:
    index, kept = NearDuplicates(threshold), []
    for ids in found:
        number = index.find_or_add(ids)
        if number is not None:
            assert similarity(ids, kept[number]) >= threshold
        elif ids:
            kept.append(ids)
    assert len(index) == len(kept)


@given(st.lists(st.integers(0, 2**31), max_size=30), st.floats(0.05, 1.0))
def test_the_same_text_again_is_always_found(ids: list[int], threshold: float) -> None:
    index = NearDuplicates(threshold)
    assert index.find_or_add(ids) is None
    assert index.find_or_add(ids) == (0 if ids else None)


@given(st.lists(st.integers(0, 5), max_size=20))
def test_the_hashes_of_runs_are_as_many_as_the_runs(ids: list[int]) -> None:
    assert len(hashed_runs(ids)) == len(runs(ids))


def test_a_short_text_is_none_of_the_runs_of_a_longer_one() -> None:
    assert not set(hashed_runs([0, 0, 0, 0])) & set(hashed_runs([0, 0, 0, 0, 0]))
    assert not set(hashed_runs([7])) & set(hashed_runs([7, 7]))


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_the_bound_on_missed_pairs_holds_and_is_not_given_away(threshold: float) -> None:
    rows = rows_per_band(threshold)
    assert HASHES % rows == 0
    assert missed(threshold, rows) <= MISSED or rows == 1
    if rows < HASHES:
        assert missed(threshold, 2 * rows) > MISSED
    # More alike, missed less.
    assert missed((1 + threshold) / 2, rows) <= missed(threshold, rows)


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


def test_a_large_set_keeps_the_first_of_every_family() -> None:
    source = random.Random(1)
    families = [[source.randrange(1000) for _ in range(120)] for _ in range(40)]
    order = [number for number in range(40) for _ in range(5)]
    source.shuffle(order)
    index, first = NearDuplicates(0.7), {}
    for number in order:
        text = list(families[number])
        text[source.randrange(120)] = 5000  # at least 0.83 alike; two of them 0.81
        found = index.find_or_add(text)
        assert found == first.get(number)
        first.setdefault(number, len(index) - 1)
    assert len(index) == 40


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01])
def test_a_threshold_that_is_none(threshold: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        NearDuplicates(threshold)
