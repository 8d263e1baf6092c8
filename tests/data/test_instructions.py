from __future__ import annotations

from typing import Any

import pytest

from fastdraft_hf.data.filters import RowFilters
from fastdraft_hf.data.instructions import asks, keep_instructions, no_words
from fastdraft_hf.data.prompts import template_ends


def row(ids: list[int], reason: str = "stop") -> dict[str, Any]:
    return {"completion_ids": ids, "finish_reason": reason}


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


@pytest.mark.parametrize(
    "text",
    [
        "Can you suggest a name for a bakery?",
        "Write a poem about rain.",
        "I'm moving to Lisbon next month. Recommend a quiet neighbourhood.",
        "Here is my essay:\n\nrewrite it in plain words",
        "I need a plan for a garden with three beds.",
        "The function below is slow; optimise nothing, but explain why.",
        "please be quick",
    ],
)
def test_what_asks(text: str) -> None:
    assert asks(text)
    assert not no_words(text, round(1.4 * len(text.split())))


@pytest.mark.parametrize(
    "text",
    [
        "The Kitebark community is committed to protecting the planet and its ecosystems.",
        "The clinical session should start with a morning kick.",
        "Revup – winter has arrived, a season of speculation in our year!",
    ],
)
def test_what_asks_nothing(text: str) -> None:
    assert not asks(text)


def test_words_that_are_none(target_tokenizer: Any) -> None:
    def judged(text: str) -> bool:
        return no_words(text, len(target_tokenizer(text)["input_ids"]))

    assert judged("Gnattik wuorfel hjaksed blimfu, tzoqqel vamdrix ulpakkoz snerq bwxilly")
    assert judged("What is a popular worksofcraiglondonappealingtonshire?")
    assert not judged("What is the most interesting thing about volcanoes in Iceland?")
    assert not judged("Solve: 3*x**2 + 17/4 - (2.5e-3) = 0, and 0x1F ^ 0b101")
    assert not judged("Visit https://example.com/a/very/long/address/indeed/that/goes/on")


def test_only_english_is_held_to_english_words(target_tokenizer: Any) -> None:
    _, suffix = template_ends(target_tokenizer)

    def reasons_of(text: str, language: str | None) -> dict[str, int]:
        ids = target_tokenizer(text, add_special_tokens=False)["input_ids"]
        _, reasons = keep_instructions(
            [row([*ids, target_tokenizer.eos_token_id])],
            target_tokenizer.decode,
            never,
            suffix=suffix,
            special_ids=set(target_tokenizer.all_special_ids),
            filters=RowFilters(language=language),
        )
        return reasons

    german = "Schreibe bitte ein kurzes Gedicht über den Regen in der alten Stadt am Fluss."
    assert reasons_of(german, None) == reasons_of(german, "de") == {"kept": 1}
    assert reasons_of(german, "en") == {"wrong language": 1}
    nothing = "The clinical session should start with a morning kick."
    assert reasons_of(nothing, "en") == {"asks nothing": 1}
    assert reasons_of(nothing, None) == {"kept": 1}
    assistant = "Sure, I can help you with that. What is the first line of your poem?"
    assert reasons_of(assistant, "en") == {"speaks as the assistant": 1}
    assert reasons_of("Can you suggest a name for a bakery?", "en") == {"kept": 1}
