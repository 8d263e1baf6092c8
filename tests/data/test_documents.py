"""The texts of a source: from any place on, in any order, shared out over processes."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import documents as module
from fastdraft_hf.data.documents import DocumentReader, documents, settled
from fastdraft_hf.data.generated import write_rows
from fastdraft_hf.data.sources import Source

from .fakes import FakeEngine, make_requests, written_ids


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Source:
    path.write_text("".join(json.dumps({column: t}) + "\n" for t in texts), encoding="utf-8")
    return Source(kind="files", name=str(path), column=column)


def test_files_of_every_kind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["p1", "p2", None]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"body": "j1"}\n\n{"body": "j2"}\n')
    (tmp_path / "c.py").write_text("code = 1\n")
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as stream:
        stream.write('{"body": "g1"}\n{"body": "g2"}')
    (tmp_path / "d").mkdir()
    source = Source(kind="files", name=str(tmp_path / "*"), column="body")
    found = list(documents(source))
    # An empty cell is an empty text, for whoever counts what is dropped.
    assert sorted(found) == ["", "code = 1\n", "g1", "g2", "j1", "j2", "p1", "p2"]
    assert found == list(documents(source))


@pytest.mark.parametrize("content", ['{"txt": "a", "n": 1}', '{"text": 3, "n": 1}'])
def test_a_wrong_column(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    source = Source(kind="files", name=str(tmp_path / "a.jsonl"))
    with pytest.raises(
        FastDraftError, match=r"a\.jsonl: column 'text' is missing.*it has: te?xt, n"
    ):
        list(documents(source))
    pq.write_table(pa.table({"body": ["p1"]}), tmp_path / "a.parquet")
    with pytest.raises(FastDraftError, match=r"a\.parquet: column 'text' .*it has: body"):
        list(documents(Source(kind="files", name=str(tmp_path / "a.parquet"))))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_line_that_is_no_json_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(module, "_STRETCH", 16)
    path = tmp_path / f"a{ending}"
    raw = b'{"text": "a"}\n\n{"text": "b"}\n{"text": \n'
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    with pytest.raises(FastDraftError, match=r"a\.jsonl(\.gz)?:4: no valid JSON"):
        list(documents(Source(kind="files", name=str(path))))


@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 40))
def test_stretches_hold_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], stretch: int
) -> None:
    source = write_jsonl(tmp_path_factory.mktemp("lines") / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STRETCH", stretch)
        assert Counter(documents(source)) == Counter(texts)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Sources of three kinds; the one of the Hub is a folder, which `datasets` opens alike."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = [f"text {number} {'x' * (number % 7)}" for number in range(60)]
    (folder / "hub").mkdir()
    for part in range(3):
        rows = pa.table({"text": texts[part::3]})
        pq.write_table(rows, folder / "hub" / f"train-{part}.parquet", row_group_size=7)
    (folder / "tree").mkdir()
    for number, text in enumerate(texts):
        (folder / "tree" / f"{number}.txt").write_text(text)
    return {
        "hub": Source(kind="hub", name=str(folder / "hub")),
        "jsonl": write_jsonl(folder / "a.jsonl", texts),
        "tree": Source(kind="files", name=str(folder / "tree")),
        "parquet": Source(kind="files", name=str(folder / "hub" / "*.parquet")),
    }


KINDS = ["hub", "jsonl", "tree", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2])
def test_going_on_at_any_place(
    corpora: dict[str, Source], monkeypatch: pytest.MonkeyPatch, kind: str, world: int
) -> None:
    monkeypatch.setattr(module, "_STRETCH", 100)

    def open_at(place: dict[str, Any]) -> DocumentReader:
        reader = DocumentReader(corpora[kind], order="a", rank=world - 1, world=world)
        reader.seek(place)
        return reader

    reader = open_at({})
    whole, places = [], []
    for document in reader:
        whole.append(document)
        places.append(json.loads(json.dumps(settled(reader.place))))
    assert len(whole) == 60 // world
    for number in range(0, len(whole), 4):
        assert list(open_at(places[number])) == whole[number + 1 :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_documents(corpora: dict[str, Source], kind: str, world: int) -> None:
    whole = list(DocumentReader(corpora[kind], order="a"))
    parts = [
        list(DocumentReader(corpora[kind], order="a", rank=rank, world=world))
        for rank in range(world)
    ]
    assert sum(len(part) for part in parts) == len(whole)
    assert sorted(chain(*parts)) == sorted(whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= (1 if kind != "hub" else 60 // world)


def test_the_order_follows_the_seed(corpora: dict[str, Source]) -> None:
    def read(order: str | None) -> list[Any]:
        return list(DocumentReader(corpora["tree"], order=order))

    assert read("a") == read("a") != read("b")
    assert sorted(read("a")) == sorted(read("b"))
    assert read(None) == read(None) != sorted(read(None))  # mixed, not by the alphabet


def test_generated_sets_are_ids(tmp_path: Path) -> None:
    requests = make_requests(9)
    write_rows(FakeEngine(), requests, tmp_path / "mine")
    reader = DocumentReader(Source(name="mine"), tmp_path)
    wanted = [list(r.prompt_ids + written_ids(r)) for r in requests]
    assert sorted(reader) == sorted(wanted)  # type: ignore[type-var]
    assert reader.dropped == {}


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastDraftError, match=r"^source hub '.*empty': "):
        list(DocumentReader(Source(kind="hub", name=str(tmp_path / "empty"))))
    with pytest.raises(FastDraftError, match=r"^source hub '.*nowhere': "):
        list(DocumentReader(Source(kind="hub", name=str(tmp_path / "nowhere"))))


def test_a_gated_set_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **given: Any) -> None:
        raise OSError("Dataset 'x/y' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FastDraftError, match=r"gated dataset.*accept its terms .*hf auth login"):
        list(DocumentReader(Source(kind="hub", name="x/y")))
