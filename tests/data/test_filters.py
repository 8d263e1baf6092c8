from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.filters import (
    FILTERS,
    LONG_LOOP_PERIOD,
    LONG_LOOP_TIMES,
    LOOP_PERIOD,
    LOOP_TAIL,
    RowFilters,
    check_language,
    in_a_long_loop,
    in_a_loop,
    in_another_language,
    judge_rows,
    keep_instructions,
    read_kept_rows,
    repeats_itself,
    write_filters,
)
from fastdraft_hf.data.generations import read_rows, write_rows

from .fakes import FakeEngine, make_requests


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


@given(st.lists(st.integers(0, 2), min_size=20, max_size=26), st.integers(1, 4))
def test_against_the_plain_definition(ids: list[int], longest: int) -> None:
    tail = 8
    end = ids[-tail:]
    plain = any(all(end[i] == end[i + p] for i in range(tail - p)) for p in range(1, longest + 1))
    assert in_a_loop(ids, tail=tail, longest_period=longest) == plain


@given(st.integers(LOOP_PERIOD + 1, LONG_LOOP_PERIOD), st.integers(0, 40), st.integers(0, 10**6))
def test_a_long_loop_is_found_when_it_came_three_times(period: int, head: int, seed: int) -> None:
    source = random.Random(seed)
    cycle = [source.randrange(1000) for _ in range(period)]
    before = [source.randrange(1000) for _ in range(head)]
    whole = cycle * LONG_LOOP_TIMES
    assert in_a_long_loop(before + whole)
    assert in_a_long_loop(before + (cycle * (LONG_LOOP_TIMES + 1))[: -period // 2])
    twice = [1001, *whole[period + 1 :]]
    assert not in_a_long_loop(before + twice)
    broken = list(whole)
    broken[source.randrange(len(broken))] += 1
    assert not in_a_long_loop(before + broken)


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
    strict = reasons_of(rows, RowFilters(cut_off="drop"))
    assert [number for number, reason in enumerate(strict) if reason == "cut off"] == [5, 6]


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
    assert reasons_of(rows, RowFilters()) == ["kept", "near duplicate", "kept", "kept"]
    assert reasons_of(rows, RowFilters(near_duplicates=1.0)) == ["kept"] * 4
    assert reasons_of(rows) == ["kept"] * 4


def test_the_wrong_language_is_dropped_when_asked() -> None:
    texts = {
        1: "The river runs through the old town and past the mill where nobody works.",
        2: "Der Fluss fließt durch die alte Stadt und an der Mühle vorbei ins weite Land.",
    }
    read: list[list[int]] = []

    def decode(ids: Any) -> str:
        read.append(list(ids))
        return texts[ids[0]]

    rows = [row([1, 9]), row([2, 9]), row([2, 4], reason="length")]
    filters = RowFilters(language="en", near_duplicates=None)
    assert reasons_of(rows, filters, decode) == ["kept", "wrong language", "wrong language"]
    assert read == [[1], [2], [2, 4]]  # the stop token is not text
    with pytest.raises(ValueError, match="decode"):
        reasons_of(rows, filters)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    write_rows(FakeEngine(), make_requests(23), folder)
    return folder


def test_every_reader_gets_the_rows_that_were_judged_once(made: Path) -> None:
    rows = read_rows(made)
    counts = write_filters(made, RowFilters(near_duplicates=0.4))
    kept, read = read_kept_rows(made)
    reasons = reasons_of(rows, RowFilters(near_duplicates=0.4))
    assert kept == [r for r, reason in zip(rows, reasons, strict=True) if reason == "kept"]
    assert counts == read == Counter(reasons)
    written = json.loads((made / FILTERS).read_text())
    assert written["settings"] == {"cut_off": "keep", "near_duplicates": 0.4, "language": None}
    assert read_rows(made) == rows  # all rows stay on disk


def test_a_set_with_missing_rows_is_refused(made: Path) -> None:
    write_filters(made, RowFilters())
    (made / "part-00000-00001.parquet").unlink()
    with pytest.raises(FastDraftError, match=r"it has 18 of 23 rows\. Run stage generate again"):
        read_kept_rows(made)


# ---- languages

TEXTS = {
    "en": "The river runs through the old town and past the mill where nobody works any more.",
    "de": "Der Fluss fließt durch die alte Stadt und an der Mühle vorbei, in der keiner arbeitet.",
    "fr": "La rivière traverse la vieille ville et passe devant le moulin où nul ne travaille.",
    "es": "El río atraviesa la ciudad vieja y pasa por el molino donde ya no trabaja nadie.",
    "ja": "川は古い町を流れ、もう誰も働いていない水車小屋のそばを通り過ぎます。",
    "ru": "Река течёт через старый город мимо мельницы, где больше никто не работает.",
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("wanted", TEXTS)
def test_only_another_language_is_wrong(text: str, wanted: str) -> None:
    assert in_another_language(TEXTS[text], wanted) == (text != wanted)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12 + 30 = 42",
        "Sí, claro.",  # too short to be sure
        "```python\ndef f(x):\n    return sorted(set(x))[-1]\n```",
        "```python\ndef unfinished(x):\n    return sorted(set(x))[-1] or unfinished(x - 1)",
    ],
)
def test_what_cannot_be_judged_is_not_wrong(text: str) -> None:
    assert not in_another_language(text, "en")
    assert not in_another_language(text, "de")


def test_a_word_in_another_language_does_not_make_the_text_so() -> None:
    text = (
        'In Spanish one says "buenos días" in the morning, and "buenas noches" before going to bed.'
    )
    assert not in_another_language(text, "en")


def test_words_around_code_are_what_is_judged() -> None:
    code = "```python\nfor the_word in the_list_of_words:\n    print(the_word)\n```"
    assert in_another_language(f"{TEXTS['de']}\n{code}\n{TEXTS['de']}", "en")
    assert not in_another_language(f"{TEXTS['en']}\n{code}", "en")


def test_a_code_that_is_no_language() -> None:
    check_language("en")
    with pytest.raises(FastDraftError, match="py3langid does not know 'english'"):
        check_language("english")


def test_without_the_language_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FastDraftError, match=r"pip install fastdraft_hf\[language\]"):
        check_language("en")


# ---- instructions of the target


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
        filters=RowFilters(near_duplicates=None),
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
    kept, reasons = keep_instructions(rows, str, never, filters=RowFilters())
    assert kept == [tuple(first), tuple(first[::-1])]
    assert reasons["near duplicate"] == 1


def test_instructions_in_another_language_are_dropped_when_asked() -> None:
    text = "Schreibe bitte ein kurzes Gedicht über den Regen in der alten Stadt am Fluss."
    for language, reason in ((None, "kept"), ("de", "kept"), ("en", "wrong language")):
        _, reasons = keep_instructions(
            [row([*range(3, 20), 2])],
            lambda ids: text,
            never,
            filters=RowFilters(language=language),
        )
        assert reasons == {reason: 1}
