from __future__ import annotations

import random
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from fastdraft_hf.data.filters import (
    LOOP_PERIOD,
    LOOP_TAIL,
    in_a_loop,
    keep_instructions,
    keep_rows,
)


@given(
    head=st.lists(st.integers(0, 9), max_size=30),
    period=st.integers(1, LOOP_PERIOD),
    extra=st.integers(0, 40),
    data=st.data(),
)
def test_a_periodic_tail_is_found(
    head: list[int], period: int, extra: int, data: st.DataObject
) -> None:
    cycle = data.draw(st.lists(st.integers(0, 9), min_size=period, max_size=period))
    tail = [cycle[i % period] for i in range(LOOP_TAIL + extra)]
    assert in_a_loop(head + tail)


@given(st.integers(0, 10**6), st.integers(0, 200))
def test_random_text_is_no_loop(seed: int, length: int) -> None:
    source = random.Random(seed)
    assert not in_a_loop([source.randrange(1000) for _ in range(length)])


@given(
    st.integers(1, LOOP_PERIOD),
    st.integers(0, LOOP_TAIL - 1),
    st.lists(st.integers(0, 9)),
)
def test_one_break_in_the_tail_is_no_loop(period: int, position: int, head: list[int]) -> None:
    tail = [i % period for i in range(LOOP_TAIL)]
    tail[position] = 99
    assert not in_a_loop(head + tail)


@given(st.lists(st.integers(0, 1), max_size=LOOP_TAIL - 1))
def test_short_texts_are_no_loops(ids: list[int]) -> None:
    assert not in_a_loop(ids)


@given(st.lists(st.integers(0, 2), min_size=20, max_size=26), st.integers(1, 4))
def test_against_the_plain_definition(ids: list[int], longest: int) -> None:
    tail = 8
    end = ids[-tail:]
    plain = any(all(end[i] == end[i + p] for i in range(tail - p)) for p in range(1, longest + 1))
    assert in_a_loop(ids, tail=tail, longest_period=longest) == plain


def row(ids: list[int], prompt: str = "p", reason: str = "stop") -> dict[str, Any]:
    return {"completion_ids": ids, "prompt_hash": prompt, "finish_reason": reason}


def test_rows_are_counted_by_reason() -> None:
    rows = [
        row([5, 6, 2]),
        row([5, 6, 2]),  # duplicate
        row([5, 6, 2], prompt="q"),  # the same answer to another prompt
        row([2]),  # nothing but the stop token
        row([], reason="length"),
        row([7], reason="length"),  # one token that is no stop token
        row([1, 2] * 40, reason="length"),
    ]
    kept, reasons = keep_rows(rows)
    assert kept == [rows[0], rows[2], rows[5]]
    assert reasons == {"kept": 3, "duplicate": 1, "empty": 2, "loop": 1}


@given(st.lists(st.builds(row, st.lists(st.integers(0, 2), max_size=3), st.sampled_from("pq"))))
def test_every_row_has_one_reason(rows: list[dict[str, Any]]) -> None:
    kept, reasons = keep_rows(rows)
    assert sum(reasons.values()) == len(rows)
    assert reasons["kept"] == len(kept)
    assert keep_rows(kept)[0] == kept  # filtering twice changes nothing


def test_instructions() -> None:
    good = [3, 4, 5, 6, 7]
    rows = [
        row([*good, 2]),
        row([*good, 2]),
        row([*good, 8, 2]),
        row(good, reason="length"),
        row([3, 4, 5, 6, 2]),
        row([3, 4] * 15 + [2]),
        row([9, 9, 8, 8, 7, 2]),
    ]
    kept, reasons = keep_instructions(
        rows, lambda ids: " ".join(map(str, ids)), lambda text: text.startswith("9 9")
    )
    assert kept == [tuple(good), (*good, 8)]
    assert reasons == {
        "kept": 2,
        "duplicate": 1,
        "cut off": 1,
        "too short": 1,
        "loop": 1,
        "overlaps held-out text": 1,
    }


@given(st.lists(st.integers(0, 50), min_size=5, max_size=20))
def test_an_instruction_is_kept_without_its_stop(ids: list[int]) -> None:
    assume(not in_a_loop(ids, tail=30, longest_period=10))
    kept, _ = keep_instructions([row([*ids, 2])], str, lambda text: False)
    assert kept == [tuple(ids)]
