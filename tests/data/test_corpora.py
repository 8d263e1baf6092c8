from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.corpora import (
    build_blocks,
    build_completions,
    check_source,
    documents,
    pack_blocks,
)
from fastdraft_hf.data.engines import Completion
from fastdraft_hf.data.generated import write_rows
from fastdraft_hf.data.requests import Request

from .fakes import FakeEngine, make_requests, written_ids

SEPARATOR = 0


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12),
    st.integers(1, 9),
    st.integers(0, 12),
)
def test_packing_keeps_every_id_once_and_in_order(
    texts: list[list[int]], length: int, count: int
) -> None:
    stream = [i for text in texts for i in text]
    blocks = list(pack_blocks(texts, length, count))
    assert all(len(block) == length for block in blocks)
    assert len(blocks) == min(count, len(stream) // length)
    assert [i for block in blocks for i in block] == stream[: len(blocks) * length]


def no_overlap(text: str) -> bool:
    return False


def files(tmp_path: Path, name: str, texts: list[str], **changes: Any) -> Source:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return Source(kind="files", name=str(path), **changes)


def test_blocks_by_weight(tmp_path: Path, tiny_tokenizer: Any) -> None:
    a = files(tmp_path, "a.jsonl", ["a" * 50] * 40, weight=3)
    b = files(tmp_path, "b.jsonl", ["z" * 50] * 40)
    blocks, summary = build_blocks(
        [a, b],
        tiny_tokenizer,
        generated=tmp_path,
        overlaps=no_overlap,
        max_tokens=640,
        length=16,
        seed=0,
    )
    assert len(blocks) == 40
    assert all(len(b["input_ids"]) == 16 and b["labels"] == b["input_ids"] for b in blocks)
    letter_a, letter_z = tiny_tokenizer.convert_tokens_to_ids(["a", "z"])
    of_a = sum(letter_a in block["input_ids"] for block in blocks)
    of_z = sum(letter_z in block["input_ids"] for block in blocks)
    assert (of_a, of_z) == (30, 10)
    assert summary[a.name]["tokens"] == 480
    assert summary[b.name] == {
        "tokens": 160,
        "passes": 1,
        "documents": 4,
        "overlaps held-out text": 0,
    }


def test_blocks_are_shuffled_by_seed_and_open_with_the_separator(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    source = files(tmp_path, "a.jsonl", [c * 7 for c in "bcdfgjklmpqrvwxyz"])

    def build(seed: int) -> list[list[int]]:
        blocks, _ = build_blocks(
            [source],
            tiny_tokenizer,
            generated=tmp_path,
            overlaps=no_overlap,
            max_tokens=8 * 17,
            length=8,
            seed=seed,
        )
        return [block["input_ids"] for block in blocks]

    assert build(1) == build(1)
    assert build(1) != build(2)
    # Separator and seven letters: each block is one document, each document comes once.
    assert all(block[0] == SEPARATOR for block in build(1))
    assert sorted(build(1)) == sorted(build(2))
    assert len({tuple(block) for block in build(1)}) == 17


def test_a_source_that_ends_is_read_again(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = files(tmp_path, "a.jsonl", ["bbb", "ccc"])
    blocks, summary = build_blocks(
        [source],
        tiny_tokenizer,
        generated=tmp_path,
        overlaps=no_overlap,
        max_tokens=4 * 20,
        length=4,
        seed=0,
    )
    counts = Counter(tuple(block["input_ids"]) for block in blocks)
    assert sorted(counts.values()) == [10, 10]  # every pass holds every document
    assert summary[source.name]["passes"] == 10
    assert summary[source.name]["documents"] == 20


def test_held_out_text_is_dropped_and_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = files(tmp_path, "a.jsonl", ["bbb", "ccc"])
    blocks, summary = build_blocks(
        [source],
        tiny_tokenizer,
        generated=tmp_path,
        overlaps=lambda text: text == "ccc",
        max_tokens=12,
        length=4,
        seed=0,
    )
    c = tiny_tokenizer.convert_tokens_to_ids("c")
    assert not any(c in block["input_ids"] for block in blocks)
    # At most one look at the dropped text a pass; the last pass may end before it.
    assert summary[source.name]["overlaps held-out text"] in (2, 3)


def test_a_source_without_text_ends(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = files(tmp_path, "a.jsonl", ["bbb"])
    with pytest.raises(FastDraftError, match="gave no text to train on"):
        build_blocks(
            [source],
            tiny_tokenizer,
            generated=tmp_path,
            overlaps=lambda text: True,
            max_tokens=8,
            length=4,
            seed=0,
        )


def test_two_sources_of_one_kind_are_both_summed_up(tmp_path: Path, tiny_tokenizer: Any) -> None:
    source = files(tmp_path, "a.jsonl", ["b" * 40] * 4)
    _, summary = build_blocks(
        [source, source],
        tiny_tokenizer,
        generated=tmp_path,
        overlaps=no_overlap,
        max_tokens=64,
        length=8,
        seed=0,
    )
    assert sum(part["tokens"] for part in summary.values()) == 64


def test_generated_blocks_are_prompt_and_completion(tmp_path: Path, tiny_tokenizer: Any) -> None:
    requests = make_requests(9)
    write_rows(FakeEngine(), requests, tmp_path / "mine")
    blocks, summary = build_blocks(
        [Source(name="mine")],
        tiny_tokenizer,
        generated=tmp_path,
        overlaps=lambda text: False,
        max_tokens=20,
        length=5,
        seed=0,
    )
    assert len(blocks) == 4
    assert summary["mine"]["passes"] == 1
    texts = [list(r.prompt_ids + written_ids(r)) for r in requests]
    stream = [i for text in texts for i in text]
    assert all(set(block["input_ids"]) <= set(stream) for block in blocks)


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


def test_files_of_every_kind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["p1", "p2"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"body": "j1"}\n\n{"body": "j2"}\n')
    (tmp_path / "c.py").write_text("code = 1\n")
    (tmp_path / "d").mkdir()
    source = Source(kind="files", name=str(tmp_path / "*"), column="body")
    assert list(documents(source)) == ["p1", "p2", "j1", "j2", "code = 1\n"]


@pytest.mark.parametrize("content", ['{"txt": "a", "n": 1}', '{"text": 3, "n": 1}'])
def test_a_wrong_column(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    source = Source(kind="files", name=str(tmp_path / "a.jsonl"))
    with pytest.raises(
        FastDraftError, match=r"a\.jsonl: column 'text' is missing.*it has: te?xt, n"
    ):
        list(documents(source))


def test_a_line_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(FastDraftError, match=r"a\.jsonl"):
        list(documents(Source(kind="files", name=str(tmp_path / "a.jsonl"))))


def test_sources_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match=r"^pretrain\.sources\[0\]\.name: no file matches"):
        check_source(Source(kind="files", name=str(tmp_path / "*.txt")), "pretrain.sources[0]", [])
    with pytest.raises(FastDraftError, match="has no set 'b'; it has: a"):
        check_source(Source(name="b"), "align.sources[0]", ["a"])
    with pytest.raises(FastDraftError, match="it has: none"):
        check_source(Source(name="b"), "align.sources[0]", [])
    check_source(Source(name="a"), "align.sources[0]", ["a"])
    check_source(Source(kind="python"), "pretrain.sources[0]", [])


def test_sources_refuse_nonsense() -> None:
    with pytest.raises(FastDraftError, match="name: needed for kind files"):
        Source(kind="files")
    with pytest.raises(FastDraftError, match="weight: must be above 0, got 0"):
        Source(kind="python", weight=0)
