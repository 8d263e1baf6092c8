"""Rows, tokens and answers of a recipe."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.plan.amounts import busiest_rows, shards, writings


def test_magpie_is_two_passes_and_samples_multiply() -> None:
    wanted = GeneratedSet(kind="magpie", rows=100, max_new_tokens=200, max_minutes=2)
    instructions, answers = writings("chat", wanted)
    assert (instructions.rows, answers.rows) == (100, 74)
    assert instructions.max_seconds == answers.max_seconds == 120
    assert answers.tokens == 150
    free = writings("text", GeneratedSet(kind="free", rows=10))
    assert [w.rows for w in free] == [10]


@given(st.integers(1, 5000), st.integers(1, 700), st.integers(1, 20))
def test_the_busiest_process_has_the_rows_of_its_shards(rows: int, size: int, count: int) -> None:
    owners = Counter(row // size % count for row in range(rows))
    most = max(owners.values())
    found = busiest_rows(rows, size, count)
    # The last shard may be short, which the estimate leaves out unless it is the only one.
    assert most <= found <= most + size
    assert found <= rows
    assert shards(rows, size) == len({row // size for row in range(rows)})
