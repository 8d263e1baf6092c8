"""Prompt lookup: what is copied, and that a draft which copies changes no text."""

import random

import pytest
import torch
from decoding_helpers import padded, write
from tiny_models import noisy
from transformers import LlamaForCausalLM

from fastdraft_hf.decode.assisted import record_rounds
from fastdraft_hf.decode.lookup import PromptLookup
from fastdraft_hf.decode.text import Text


def text_of(*rows: list[int]) -> Text:
    ids = torch.tensor(rows)
    return Text(ids, None, torch.arange(ids.shape[1]).expand(len(rows), -1), 0)


def test_what_followed_the_last_time_is_copied() -> None:
    lookup = PromptLookup(
        text_of([1, 2, 7, 8, 1, 2, 9, 5, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]), 2
    )
    assert lookup.copy(0, 3, 9) == [9, 5, 1]
    assert lookup.copy(0, 3, 2) == [9, 5]
    assert lookup.copy(0, 0, 0) == []
    assert lookup.copy(1, 3, 9) == []


def test_what_was_written_is_copied_too_and_a_short_copy_goes_round() -> None:
    text = text_of([3, 4, 5])
    lookup = PromptLookup(text, 2)
    assert lookup.copy(0, 5, 9) == []
    text.append(0, [6, 4, 5])
    assert lookup.copy(0, 5, 9) == [6, 4, 5, 6, 4]
    text.append(0, [6])
    assert lookup.copy(0, 2, 9) == [4, 5]
    text.append(0, [6])
    assert lookup.copy(0, 1, 9) == []


def test_a_text_shorter_than_what_must_be_equal_copies_nothing() -> None:
    assert PromptLookup(text_of([5, 5]), 3).copy(0, 4, 9) == []
    assert PromptLookup(text_of([5, 5, 5, 5]), 3).copy(0, 2, 9) == [5, 5]


def test_a_row_whose_copies_are_never_right_copies_no_more() -> None:
    lookup = PromptLookup(text_of([1, 1, 1], [1, 1, 1]), 1)
    for _ in range(6):
        lookup.judge(0, 2, 0)
    lookup.judge(0, 2, 1)
    lookup.judge(0, 2, 0)
    lookup.judge(0, 2, 0)
    assert lookup.copy(0, 1, 9) == [1]
    lookup.judge(0, 2, 0)
    assert lookup.copy(0, 1, 9) == []
    lookup.judge(1, 2, 0)
    assert lookup.copy(1, 1, 9) == [1]


def test_copies_that_are_accepted_whole_grow() -> None:
    lookup = PromptLookup(text_of([1, 1, 1], [1, 1, 1]), 1)
    lengths = []
    for _ in range(4):
        lengths.append(len(lookup.copy(0, 3, 99)))
        lookup.judge(0, lengths[-1], lengths[-1])
    assert lengths == [3, 6, 12, 12]
    assert len(lookup.copy(0, 3, 7)) == 7
    lookup.judge(0, 7, 6)
    assert len(lookup.copy(0, 3, 99)) == len(lookup.copy(1, 3, 99)) == 3


def test_a_copied_block_takes_no_pass_of_the_draft(target: LlamaForCausalLM) -> None:
    """Greedy text of a tiny model soon repeats itself; its perfect draft is needed until then."""
    draft = noisy(target, 0.0)
    passes: list[int] = []
    draft.register_forward_pre_hook(
        lambda _, args, given: passes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    counts = {}
    for copies in (0, 2):
        passes.clear()
        with record_rounds(target) as rounds:
            write(target, [[5, 6, 7]], draft, 3, copies=copies, max_new_tokens=120)
        counts[copies] = len(passes)
        # A copy may be as long as two blocks or four.
        assert {drafted for drafted, _ in rounds[:-1]} == ({3, 6, 12} if copies else {3})
    assert counts[2] < counts[0] / 2


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}])
def test_rows_that_copy_beside_rows_that_do_not(
    target: LlamaForCausalLM, neighbour: LlamaForCausalLM, sampling: dict[str, float]
) -> None:
    rng = random.Random(4)
    for gamma in (1, 3, 6):
        prompts = [[rng.randrange(3, 288) for _ in range(rng.randrange(1, 9))] for _ in range(3)]
        prompts.append([9, 8, 7, 6, 5, 9, 8, 7])
        ids, mask = padded(prompts)
        given = {"attention_mask": mask, "max_new_tokens": 40, **sampling}
        alone = write(target, ids, **given)
        assert torch.equal(write(target, ids, neighbour, gamma, copies=1, **given), alone)
