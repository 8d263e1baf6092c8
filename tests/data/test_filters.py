import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import parts
from fastdraft_hf.data.filters import (
    LOOP_PERIOD,
    LOOP_TAIL,
    LOOP_TIMES,
    RUN,
    NearDuplicates,
    in_a_loop,
    iter_kept_rows,
    judge_rows,
    keep_instructions,
    repeats_itself,
    write_filters,
)
from fastdraft_hf.data.parts import iter_rows, write_rows

from .fakes import FakeEngine, make_requests


@given(
    head=st.lists(st.integers(0, 9), max_size=30),
    period=st.integers(1, 20),
    extra=st.integers(0, 40),
    data=st.data(),
)
def test_a_periodic_tail_is_found(
    head: list[int], period: int, extra: int, data: st.DataObject
) -> None:
    cycle = data.draw(st.lists(st.integers(0, 9), min_size=period, max_size=period))
    tail = [cycle[i % period] for i in range(LOOP_TAIL + extra)]
    assert in_a_loop(head + tail)


@given(
    st.integers(LOOP_TAIL // LOOP_TIMES + 1, LOOP_PERIOD), st.integers(0, 40), st.integers(0, 10**6)
)
def test_a_long_loop_is_found_when_it_came_three_times(period: int, head: int, seed: int) -> None:
    source = random.Random(seed)
    cycle = [source.randrange(1000) for _ in range(period)]
    before = [source.randrange(1000) for _ in range(head)]
    whole = cycle * LOOP_TIMES
    assert in_a_loop(before + whole)
    assert in_a_loop(before + (cycle * (LOOP_TIMES + 1))[: -period // 2])
    twice = [1001, *whole[period + 1 :]]
    assert not in_a_loop(before + twice)
    broken = list(whole)
    broken[source.randrange(len(broken))] += 1
    assert not in_a_loop(before + broken)


@given(st.integers(0, 10**6), st.integers(0, 300), st.integers(2, 6))
def test_a_list_that_says_the_same_again_repeats_itself(seed: int, head: int, items: int) -> None:
    source = random.Random(seed)
    item = [source.randrange(1000) for _ in range(60)]
    counted = [token for number in range(items) for token in (2000 + number, *item)]
    before = [source.randrange(1000) for _ in range(head)]
    text = before + counted
    # Of each further item, the runs that hold no number: 60 - 5 of 61.
    old = (items - 1) * (60 - 5)
    assert repeats_itself(text) == (len(text) >= 100 and old > (len(text) - 5) / 2)
    assert not in_a_loop(text)


def row(ids: list[int], prompt: str = "p", reason: str = "stop", index: int = 0) -> dict[str, Any]:
    return {
        "index": index,
        "prompt_ids": [ord(letter) for letter in prompt],
        "completion_ids": ids,
        "prompt_hash": prompt,
        "finish_reason": reason,
    }


def reasons_of(rows: list[dict[str, Any]], *how: Any) -> list[str]:
    return [reason for _, reason in judge_rows(rows, *how)]


def test_rows_are_judged_by_reason() -> None:
    judged = [
        (row([5, 6, 2]), "kept"),
        (row([5, 6, 2]), "duplicate"),
        (row([5, 6, 2], prompt="q"), "kept"),  # the same answer to another prompt
        (row([2]), "empty"),  # nothing but the stop token
        (row([], reason="length"), "empty"),
        (row([7], reason="length"), "kept"),  # one token that is not a stop token
        (row([1, 2] * 40, reason="length"), "loop"),
        (row([*([1, 3] * 40), 2]), "loop"),  # it looped, and then it stopped
        (row([*range(200, 230), *list(range(50)) * 3, 2]), "loop"),
    ]
    rows = [row for row, _ in judged]
    assert reasons_of(rows) == [reason for _, reason in judged]


def test_near_duplicates_are_dropped_and_what_all_prompts_share_does_not_count() -> None:
    answer = list(range(100, 160))
    other = list(range(300, 304))
    template, end = "a template that every prompt begins with: ", " and ends with"
    rows = [
        row([*answer, 2], f"{template}one{end}"),
        row([*answer[:-1], 7, 2], f"{template}one{end}"),  # one token of sixty differs
        row([*other, 2], f"{template}one{end}"),
        row([*other, 8, 2], f"{template}two{end}"),  # short answers that are really different
    ]
    assert reasons_of(rows, 0.8) == ["kept", "near duplicate", "kept", "kept"]
    assert reasons_of(rows, 1.0) == ["kept"] * 4
    assert reasons_of(rows) == ["kept"] * 4


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
        index = NearDuplicates(threshold)
        index.find_or_add(first)
        is_near = similarity(first, second) >= threshold
        assert (index.find_or_add(second) == 0) == is_near
        above, below = above + is_near, below + (not is_near)
    assert min(above, below) > 40


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(parts, "ROWS_PER_PART", 5)
    folder = tmp_path / "set"
    write_rows(FakeEngine(), make_requests(23), folder)
    return folder


def test_every_reader_gets_the_rows_that_were_judged_once(made: Path) -> None:
    rows = list(iter_rows(made))
    counts = write_filters(made, 0.4)
    reasons = reasons_of(rows, 0.4)
    assert list(iter_kept_rows(made)) == [
        r for r, reason in zip(rows, reasons, strict=True) if reason == "kept"
    ]
    assert counts == Counter(reasons)
    assert list(iter_rows(made)) == rows  # all rows stay on disk


def test_a_set_with_missing_rows_is_refused(made: Path) -> None:
    write_filters(made, 0.8)
    (made / "part-00000-00001.parquet").unlink()
    with pytest.raises(FastDraftError, match=r"it has 18 of 23 rows\. Run stage generate again"):
        iter_kept_rows(made)
    (made.parent / "provenance.json").write_text("{}")  # of the finished stage
    (made / "filters.json").write_text("")
    with pytest.raises(FastDraftError, match=r"filters\.json is damaged: not valid JSON"):
        iter_kept_rows(made)
    (made / "filters.json").unlink()
    with pytest.raises(FastDraftError, match=r"filters\.json is missing\. Run stage generate"):
        iter_kept_rows(made)


def never(text: str) -> bool:
    return False


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
        row([3, 4, 1, 6, 7, 2]),
    ]
    kept, reasons = keep_instructions(
        rows,
        lambda ids: " ".join(map(str, ids)),
        lambda text: text.startswith("9 9"),
        special_ids={1, 2},
        near_duplicates=None,
    )
    assert kept == [tuple(good), (*good, 8)]
    assert reasons == {
        "kept": 2,
        "duplicate": 1,
        "cut off": 1,
        "too short": 1,
        "loop": 1,
        "overlaps held-out text": 1,
        "special token": 1,
    }


def test_near_instructions_are_asked_once() -> None:
    first = list(range(10, 40))
    rows = [row([*first, 2]), row([*first[:-1], 5, 2]), row([*first[::-1], 2])]
    kept, reasons = keep_instructions(rows, str, never, near_duplicates=0.8)
    assert kept == [tuple(first), tuple(first[::-1])]
    assert reasons["near duplicate"] == 1
