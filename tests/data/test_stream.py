"""A mixture read while training: shares, places, processes, what is left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import stream as module
from fastdraft_hf.data.encoding import DocumentEncoder
from fastdraft_hf.data.generated import write_rows
from fastdraft_hf.data.sources import Source
from fastdraft_hf.data.stream import BlockStream, as_dataset

from .fakes import FakeEngine, make_requests

LENGTH, WINDOW = 8, 6
Make = Callable[..., BlockStream]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Local lines, a stream as of the Hub, and a set that the target wrote."""
    folder = tmp_path_factory.mktemp("sources")
    lines = write(folder / "a.jsonl", [f"{'b' * (7 * n % 31)}{n}" for n in range(40)])
    (folder / "hub").mkdir()
    for part in range(2):
        texts = [f"{'z' * (5 * n % 17)}{n}{part}" for n in range(30)]
        pq.write_table(
            pa.table({"text": texts}), folder / "hub" / f"train-{part}.parquet", row_group_size=8
        )
    write_rows(FakeEngine(), make_requests(12), folder / "mine")
    return [
        Source(kind="files", name=lines, weight=3),
        Source(kind="hub", name=str(folder / "hub"), weight=2),
        Source(kind="generated", name="mine", weight=1),
    ]


@pytest.fixture
def make(sources: list[Source], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(module, "_BATCH_CHARS", 60)

    def build(chosen: list[Source] | None = None, **changes: Any) -> BlockStream:
        given = {"overlaps": lambda text: False, "length": LENGTH, "seed": 0, "window": WINDOW}
        folder = Path(sources[0].name).parent
        return BlockStream(
            sources if chosen is None else chosen,
            tiny_tokenizer,
            **{"generated": folder, **given, **changes},
        )

    return build


def take(stream: BlockStream, count: int) -> list[list[int]]:
    return [row["input_ids"] for row in islice(stream, count)]


def test_every_iteration_begins_at_the_start(make: Make) -> None:
    stream = make()
    assert take(stream, 20) == take(stream, 20) == take(make(), 20)
    assert take(make(seed=1), 20) != take(stream, 20)
    row = next(iter(stream))
    assert row["labels"] == row["input_ids"]
    assert len(row["labels"]) == LENGTH


def test_weights_are_shares_of_tokens(make: Make, sources: list[Source]) -> None:
    """Exact to a block in every window, though documents are short in one and long in another."""
    stream = make()
    take(stream, 150)
    read = stream.place(144)["read"]
    counts = [read[key]["tokens"] for key in (sources[0].name, sources[1].name, "mine")]
    assert sum(counts) % (WINDOW * LENGTH) == 0
    for count, share in zip(counts, (3, 2, 1), strict=True):
        assert abs(count / LENGTH - sum(counts) / LENGTH * share / 6) <= 1


@settings(max_examples=20)
@given(data=st.data())
def test_going_on_at_any_place_gives_what_would_have_come(make: Make, data: Any) -> None:
    """Also in later passes, in the middle of windows and batches, and twice over."""
    whole = take(make(), 160)
    first = data.draw(st.integers(0, 90))
    stream = make()
    ahead = data.draw(st.integers(1, 20))  # a loader fetches some that are not trained on
    assert take(stream, first + ahead) == whole[: first + ahead]
    place = json.loads(json.dumps(stream.place(first)))
    resumed = make()
    resumed.seek(place)
    second = data.draw(st.integers(0, 40))
    assert take(resumed, second + 3) == whole[first : first + second + 3]
    place = json.loads(json.dumps(resumed.place(second)))
    again = make()
    again.seek(place)
    assert take(again, 20) == whole[first + second : first + second + 20]


def test_counts_go_on_over_a_kill(make: Make) -> None:
    stream = make()
    take(stream, 101)
    resumed = make()
    resumed.seek(json.loads(json.dumps(stream.place(50))))
    take(resumed, 51)
    assert resumed.place(50)["read"] == stream.place(100)["read"]


def test_passes_differ_and_hold_every_document(
    make: Make, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdraft_hf.data import documents

    monkeypatch.setattr(documents, "_STRETCH", 40)
    # Seven ids and the end: a document a block.
    texts = [c * 7 for c in "bcdfgjklmpqrvwxyz"]
    source = Source(kind="files", name=write(tmp_path / "a.jsonl", texts))
    stream = make([source], window=17)
    rows = [tuple(row) for row in take(stream, 51)]
    passes = [rows[:17], rows[17:34], rows[34:]]
    assert all(set(p) == set(passes[0]) and len(set(p)) == 17 for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert all(row[-1] == 0 for row in rows)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_documents(
    make: Make, tmp_path: Path, sources: list[Source], world: int
) -> None:
    """In a pass, none twice and together all of them."""
    texts = [c * 7 for c in "bcdfgjklmpqrvwxyz"] + ["h" * 7]  # a document a block
    local = Source(kind="files", name=write(tmp_path / "a.jsonl", texts))
    (tmp_path / "hub").mkdir()
    for part in range(2):
        rows = pa.table({"text": texts[part::2]})
        pq.write_table(rows, tmp_path / "hub" / f"train-{part}.parquet")
    for source in (local, Source(kind="hub", name=str(tmp_path / "hub"))):
        whole = Counter(map(tuple, take(make([source], window=1), 18)))
        shared: Counter[Any] = Counter()
        for rank in range(world):
            stream = make([source], rank=rank, world=world, window=1)
            shared.update(map(tuple, take(stream, 18 // world)))
        assert shared == whole


def test_held_out_blocks_are_not_read_again(
    make: Make, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{c}{d}" * 3 + c for c in "bcdfgjklm" for d in "pqrvwxyz"]
    source = Source(kind="files", name=write(tmp_path / "a.jsonl", texts))
    blocks, hashes, facts = make([source]).held_out(5)
    assert len(blocks) == 5
    assert len(hashes) == 5  # a document a block: no more is lost than is held out
    assert facts[source.name]["bytes_per_token"] > 0.5
    stream = make([source], left_out=hashes)
    held = {tiny_tokenizer.decode([i for i in b if i]) for b in blocks}
    trained = {tiny_tokenizer.decode([i for i in b if i]) for b in take(stream, 200)}
    assert held <= set(texts)
    assert trained == set(texts) - _texts(hashes, texts, tiny_tokenizer)
    assert not held & trained
    dropped = stream.place(200)["read"][source.name]["dropped"]
    assert dropped[module.HELD_OUT] >= len(hashes)


def _texts(hashes: frozenset[int], texts: list[str], tokenizer: Any) -> set[str]:
    found = DocumentEncoder(tokenizer, lambda text: False)([*texts]).hashes.tolist()
    return {text for text, number in zip(texts, found, strict=True) if number in hashes}


def test_a_source_too_small_to_hold_out(make: Make, tmp_path: Path) -> None:
    source = Source(kind="files", name=write(tmp_path / "a.jsonl", ["bcdfgjk"] * 2))
    blocks, hashes, _ = make([source]).held_out(5)
    assert (blocks, hashes) == ([], frozenset())
    assert len(take(make([source]), 5)) == 5


def test_a_source_without_text_ends(make: Make, tmp_path: Path) -> None:
    source = Source(kind="files", name=write(tmp_path / "a.jsonl", ["bbb", ""]))
    with pytest.raises(
        FastDraftError, match=r"no text to train on \(overlaps.*: 1, empty: 1\)|: 1"
    ):
        take(make([source], overlaps=lambda text: bool(text)), 1)


def test_what_was_so_long_ago_is_not_kept(make: Make) -> None:
    stream = make()
    take(stream, WINDOW * (module._WINDOWS_KEPT + 2))
    with pytest.raises(ValueError, match="so long ago"):
        stream.place(0)


def test_as_a_data_set(make: Make) -> None:
    stream = make()
    dataset = as_dataset(stream)
    assert list(dataset.features) == ["input_ids", "labels"]
    rows = [row["input_ids"] for row in dataset.repeat(None).take(30)]
    assert rows == take(stream, 30)
