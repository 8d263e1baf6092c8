"""Rows, tokens and answers of a recipe."""

from __future__ import annotations

from fastdraft_hf.data.config import GeneratedSet
from fastdraft_hf.pipeline.plan.amounts import writings


def test_magpie_is_two_passes_and_samples_multiply() -> None:
    wanted = GeneratedSet(kind="magpie", rows=100, max_new_tokens=200, max_minutes=2)
    instructions, answers = writings("chat", wanted)
    assert (instructions.rows, answers.rows) == (100, 74)
    assert instructions.max_seconds == answers.max_seconds == 120
    assert answers.tokens == 150
    free = writings("text", GeneratedSet(kind="free", rows=10))
    assert [w.rows for w in free] == [10]
