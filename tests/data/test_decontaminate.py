from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.data.decontaminate import NGRAM, Decontaminator
from fastdraft_hf.data.prompts import CODE_INSTRUCTION
from fastdraft_hf.data.task_sets import load_task_set

WORDS = [f"word{i}" for i in range(40)]


@pytest.fixture(scope="module")
def real() -> Decontaminator:
    return Decontaminator.of_task_sets()


@given(
    start=st.integers(0, 20),
    shared=st.integers(0, 20),
    before=st.lists(st.just("other"), max_size=5),
    separator=st.sampled_from([" ", "\n", ", ", "... "]),
)
def test_thirteen_words_are_too_many(
    start: int, shared: int, before: list[str], separator: str
) -> None:
    check = Decontaminator([" ".join(WORDS)])
    text = separator.join([*before, *WORDS[start : start + shared], "else"]).upper()
    assert check.overlaps(text) == (shared >= NGRAM)


def test_runs_are_contiguous_words_of_one_text() -> None:
    check = Decontaminator([" ".join(WORDS[:20]), " ".join(WORDS[20:])])
    assert not check.overlaps(" ".join([*WORDS[:12], "x", *WORDS[12:20]]))
    assert not check.overlaps(" ".join(WORDS[8:32]))


@pytest.mark.parametrize(("words", "found"), [(4, False), (5, True), (12, True)])
def test_short_texts_are_matched_whole(words: int, found: bool) -> None:
    check = Decontaminator([" ".join(WORDS[:words])])
    assert check.overlaps(" ".join(["so", *WORDS[:words], "on"])) is found
    assert not check.overlaps(" ".join(["so", *WORDS[: words - 1], "on"]))


LETTERS = st.lists(st.sampled_from("abc"), max_size=16).map(" ".join)


@given(st.lists(LETTERS, max_size=4), LETTERS)
def test_it_is_what_the_rule_says(held_out: list[str], text: str) -> None:
    """Few words, so that they meet: the rule, written plainly."""

    def shared(other: str) -> bool:
        words = other.split()
        length = min(len(words), NGRAM)
        return length >= 5 and any(
            f" {' '.join(words[i : i + length])} " in f" {text} "
            for i in range(len(words) - length + 1)
        )

    assert Decontaminator(held_out).overlaps(text) == any(map(shared, held_out))


def test_held_out_texts_overlap_themselves(real: Decontaminator) -> None:
    humaneval = load_task_set("humaneval")
    assert all(real.overlaps(prompt.text) for prompt in humaneval)
    assert all(real.overlaps(prompt.instruction) for prompt in humaneval)
    assert all(real.overlaps(prompt.also) for prompt in humaneval)  # solutions and tests
    assert all(real.overlaps(prompt.text) for prompt in load_task_set("ifbench"))
    assert not real.overlaps("The weather was fine and the two of us went to the sea that day.")


def test_no_code_instruction_left_shares_a_run(real: Decontaminator, heads: list[str]) -> None:
    """The same question asked in another way: sets of joined words."""

    def runs(text: str) -> set[str]:
        words = re.findall(r"[a-z0-9_]+", text.lower())
        return {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}

    held_out: set[str] = set()
    for task in ("humaneval", "ifbench"):
        for prompt in load_task_set(task):
            held_out |= runs(prompt.text) | runs(prompt.also)
    instructions = {CODE_INSTRUCTION.format(head.rstrip()) for head in heads}
    clean = [text for text in instructions if not real.overlaps(text)]
    assert len(clean) > 1000
    assert [text for text in clean if runs(text) & held_out] == []
