"""Rows that align reads, from generated sets and from stored distributions."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import parts
from fastdraft_hf.data.columns import LISTS, TEMPERATURE, check_distribution
from fastdraft_hf.data.corpus import open_completions
from fastdraft_hf.data.engines import Completion, Request
from fastdraft_hf.data.parts import write_rows
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.target_logits import write_target_logits
from fastdraft_hf.data.task_sets import Decontaminator

from .fakes import FakeEngine, in_processes, make_requests


class Words:
    """Stands in for a tokenizer where only `decode` is needed."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Answers(FakeEngine):
    """Answers of given lengths, with an id of their own each."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths = lengths

    def generate(self, requests: Any, on_tokens: Any) -> Iterator[Completion]:
        for request in requests:
            ids = tuple(100 + request.index for _ in range(self.lengths[request.index]))
            yield Completion(request, ids, "length")


def opened(folder: Path, rows: str = "rows", **given: Any) -> tuple[Any, Any, dict[str, Any]]:
    arguments: dict[str, Any] = {
        "sources": [Source(name="s")],
        "folder": folder / rows,
        "generated": folder,
        "logits": None,
        "tokenizer": Words(),
        "decontaminator": Decontaminator([]),
        "max_length": 1000,
        "eval_rows": 0,
        "seed": 0,
        **given,
    }
    made = open_completions(arguments.pop("sources"), **arguments)
    return made.train, made.eval, made.summary["sources"]


@settings(max_examples=20)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=8),
    max_length=st.integers(1, 16),
)
def test_labels_cover_the_completion_only(shapes: list[tuple[int, int]], max_length: int) -> None:
    requests = [Request(i, (i,) * prompt, 0.0, i, 8, "s") for i, (prompt, _) in enumerate(shapes)]
    expected = {
        i: ([i] * prompt + [100 + i] * answer, [-100] * prompt + [100 + i] * answer)
        for i, (prompt, answer) in enumerate(shapes)
        if prompt < max_length
    }
    with tempfile.TemporaryDirectory() as name:
        write_rows(Answers([answer for _, answer in shapes]), requests, Path(name) / "s")
        if not expected:
            with pytest.raises(FastDraftError, match=r"align\.sources: no row is left to train on"):
                opened(Path(name), max_length=max_length)
            return
        train, evaluated, summary = opened(Path(name), max_length=max_length)
        assert evaluated is None
        found = {row["input_ids"][0]: (row["input_ids"], row["labels"]) for row in train}
    assert found == expected
    labelled = sum(len([x for x in labels[:max_length] if x >= 0]) for _, labels in found.values())
    assert summary["s"]["completion_tokens"] == labelled
    assert summary["s"].get("prompt too long", 0) == len(shapes) - len(expected)
    assert summary["s"]["kept"] == len(expected)


@pytest.mark.parametrize("stored", [False, True])
def test_the_order_does_not_depend_on_the_processes(
    tmp_path: Path, tiny_model: Any, stored: bool
) -> None:
    model = tiny_model(seed=2)
    found = []
    for world, size in ((1, 100), (3, 4)):
        folder = tmp_path / str(world)

        def work(rank: int, folder: Path = folder) -> None:
            write_rows(FakeEngine(seed=rank), make_requests(30), folder / "s")

        def store(rank: int, folder: Path = folder) -> None:
            logits = folder / "logits" / "s"
            write_target_logits(model, folder / "s", logits, top_k=3, temperature=0.5)

        in_processes(world, work, size)
        in_processes(world, store, size)
        train, evaluated, _ = opened(
            folder, eval_rows=4, logits=folder / "logits" if stored else None
        )
        assert train.cache_files  # memory-mapped
        found.append([train.to_list(), evaluated.to_list()])
        again, _, _ = opened(folder, eval_rows=4)  # the rows are prepared once
        assert again.to_list() == found[-1][0]
        if stored:
            assert set(train.column_names) == {"input_ids", "labels", *LISTS, TEMPERATURE}
            check_distribution(train, vocab_size=288, temperature=0.5)
    names = ["input_ids", "labels"]
    for one, other in zip(*found, strict=True):
        assert [[row[name] for name in names] for row in one] == [
            [row[name] for name in names] for row in other
        ]
    other_order, _, _ = opened(tmp_path / "1", rows="other", eval_rows=4, seed=1)
    assert [row["labels"] for row in other_order] != [row["labels"] for row in found[0][0]]


def test_missing_distributions_are_named(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ROWS_PER_PART", 4)
    write_rows(FakeEngine(), make_requests(12), tmp_path / "s")
    logits = tmp_path / "logits"
    write_target_logits(tiny_model(), tmp_path / "s", logits / "s", top_k=3, temperature=1.0)
    next((logits / "s").glob("*.parquet")).unlink()
    with pytest.raises(FastDraftError, match=r"set s has \d of 12 rows\. Run stage logits again"):
        opened(tmp_path, logits=logits)
    assert isinstance(opened(tmp_path, keep=lambda index: index > 5)[0], datasets.Dataset)
