"""A finished set that is asked for more rows."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import growing
from fastdraft_hf.data.generated import read_rows, write_rows
from fastdraft_hf.data.shards import MANIFEST

from .fakes import FakeEngine, Killed, make_requests


@given(
    rows=st.lists(st.integers(0, 20), min_size=2, max_size=4).map(sorted),
    sizes=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    kills=st.lists(st.integers(0, 20), max_size=3),
)
def test_it_becomes_the_set_that_it_would_have_been(
    rows: list[int], sizes: list[int], kills: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name) / "set", Path(name) / "whole"
        written: list[int] = []
        for count, size in zip(rows, sizes, strict=False):
            for kill in kills:
                engine = FakeEngine(in_flight=3, dies_after=kill)
                try:
                    write_rows(engine, make_requests(count), folder, rows_per_shard=size)
                except Killed:
                    continue
            before = {row["index"] for row in read_rows(folder)} if _finished(folder) else set()
            engine = FakeEngine(in_flight=2)
            found: list[tuple[int, int]] = []
            write_rows(
                engine,
                make_requests(count),
                folder,
                rows_per_shard=size,
                on_found=lambda *rows, found=found: found.append(rows),
            )
            assert found == [(count - len(engine.begun), count)]
            assert before.isdisjoint(engine.begun)  # nothing of a finished set is written again
            written += engine.begun
        write_rows(FakeEngine(), make_requests(rows[-1]), whole, rows_per_shard=sizes[0])
        assert read_rows(folder) == read_rows(whole)
        files = [sorted(p.name for p in f.iterdir()) for f in (folder, whole)]
        assert files[0] == files[1]
        facts = [json.loads((f / MANIFEST).read_text()) for f in (folder, whole)]
        assert facts[0]["shards"] == facts[1]["shards"]
        assert facts[0]["requests"] == rows[-1]


def _finished(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


@pytest.mark.parametrize(
    "function", ["write_json", "write_facts", "write_shard", "read_sound", "unlink"]
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_killed_while_it_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, when: str, call: int
) -> None:
    folder = tmp_path / "set"
    write_rows(FakeEngine(), make_requests(8), folder, rows_per_shard=3)
    owner: Any = Path if function == "unlink" else growing
    real = getattr(owner, function)
    calls = itertools.count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        dies = next(calls) == call
        if dies and when == "before":
            raise Killed
        result = real(*args, **kwargs)
        if dies:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, dying)
        try:
            growing.reopen(folder, 11, 3)
        except Killed:
            pass
        else:
            assert next(calls) <= call  # it is called less often
    engine = FakeEngine(seed=1)
    write_rows(engine, make_requests(11), folder, rows_per_shard=3)
    assert [row["index"] for row in read_rows(folder)] == list(range(11))
    assert sorted(engine.begun) == [8, 9, 10]
    assert [p.name for p in folder.glob("*.json")] == [MANIFEST]


def test_sets_of_earlier_versions(tmp_path: Path) -> None:
    """Their manifests say neither what was asked for nor the size of a shard."""
    folder = tmp_path / "set"
    write_rows(FakeEngine(), make_requests(5), folder, rows_per_shard=2)
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["requests"], manifest["rows_per_shard"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(FastDraftError, match="not a shard of 3 rows; set generate"):
        write_rows(FakeEngine(), make_requests(7), folder, rows_per_shard=3)
    assert len(read_rows(folder)) == 5
    write_rows(FakeEngine(), make_requests(7), folder, rows_per_shard=2)
    assert len(read_rows(folder)) == 7


def test_a_damaged_shard_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_rows(FakeEngine(), make_requests(5), folder, rows_per_shard=2)
    (folder / "part-00001.parquet").write_bytes(b"other")
    before = {p.name: p.read_bytes() for p in folder.glob("*.parquet")}
    engine = FakeEngine()
    with pytest.raises(FastDraftError, match=r"part-00001\.parquet: missing or damaged"):
        write_rows(engine, make_requests(7), folder, rows_per_shard=2)
    assert not engine.begun
    assert {p.name: p.read_bytes() for p in folder.glob("*.parquet")} == before
    assert _finished(folder)


def test_a_set_that_time_ended_is_as_large_as_it_gets(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_rows(FakeEngine(), make_requests(5), folder, rows_per_shard=2, max_minutes=0.0)
    engine = FakeEngine()
    write_rows(engine, make_requests(9), folder, rows_per_shard=2, max_minutes=0.0)
    assert not engine.begun
    assert _finished(folder)


def test_the_time_of_both_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_rows(FakeEngine(), make_requests(2), folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "seconds": 1000.0}))
    write_rows(FakeEngine(), make_requests(3), folder)
    assert json.loads((folder / MANIFEST).read_text())["seconds"] >= 1000.0
