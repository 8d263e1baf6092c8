from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.corpora import build_completions
from fastdraft_hf.data.engines import Completion
from fastdraft_hf.data.generated import write_rows
from fastdraft_hf.data.requests import Request
from fastdraft_hf.data.sources import Source

from .fakes import FakeEngine, make_requests, written_ids


class Words:
    """Stands in for a tokenizer where only the way back to text is asked for."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Answers(FakeEngine):
    """Answers of a given length, told apart by their ids."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths = lengths

    def generate(self, requests: Any, on_tokens: Any) -> Iterator[Completion]:
        for request in requests:
            ids = tuple(100 + request.index for _ in range(self.lengths[request.index]))
            yield Completion(request, ids, "length")


@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=8),
    max_length=st.integers(1, 16),
)
def test_labels_cover_the_completion_only(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], max_length: int
) -> None:
    folder = tmp_path_factory.mktemp("generated")
    requests = [Request(i, (i,) * prompt, 0.0, i, 8, "s") for i, (prompt, _) in enumerate(shapes)]
    write_rows(Answers([answer for _, answer in shapes]), requests, folder / "s")
    examples, rows, summary = build_completions(
        [Source(name="s")],
        Words(),
        generated=folder,
        overlaps=lambda text: False,
        max_length=max_length,
        seed=0,
    )
    expected = []
    for i, (prompt, answer) in enumerate(shapes):
        if prompt < max_length:
            room = min(answer, max_length - prompt)
            ids, labels = [i] * prompt + [100 + i] * room, [-100] * prompt + [100 + i] * room
            expected.append({"input_ids": ids, "labels": labels})
    for example, (name, index) in zip(examples, rows, strict=True):
        assert (name, index) == ("s", example["input_ids"][0])
    key = json.dumps
    assert sorted(examples, key=key) == sorted(expected, key=key)
    labelled = sum(label != -100 for e in examples for label in e["labels"])
    assert summary["s"]["completion_tokens"] == labelled
    assert summary["s"].get("prompt too long", 0) == len(shapes) - len(expected)


def test_alignment_reads_generated_sets_only(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match=r"align: source 'python' is python"):
        build_completions(
            [Source(kind="python")],
            Words(),
            generated=tmp_path,
            overlaps=lambda text: False,
            max_length=8,
            seed=0,
        )


def test_answers_that_repeat_held_out_text_are_dropped(tmp_path: Path) -> None:
    requests = make_requests(9)
    write_rows(FakeEngine(), requests, tmp_path / "mine")
    told = Words().decode([*requests[4].prompt_ids, *written_ids(requests[4])])
    examples, rows, summary = build_completions(
        [Source(name="mine")],
        Words(),
        generated=tmp_path,
        overlaps=lambda text: text == told,
        max_length=1000,
        seed=0,
    )
    assert summary["mine"]["overlaps held-out text"] == 1
    assert len(examples) == len(rows) == 8
