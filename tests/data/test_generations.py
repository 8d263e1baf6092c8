"""A set of generated rows: written, killed, resumed, grown, damaged, and limited in time."""

import errno
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import parts
from fastdraft_hf.data.engines import Request
from fastdraft_hf.data.filters import kept_indices
from fastdraft_hf.data.parts import PARTS, build_requests, iter_rows, stored_indices, write_rows

from .fakes import FakeEngine, in_processes, make_requests, written_ids


def check_complete(folder: Path, requests: list[Request]) -> None:
    rows = list(iter_rows(folder))
    assert [row["index"] for row in rows] == [r.index for r in requests]
    assert sum(pyarrow.parquet.read_metadata(p).num_rows for p in folder.glob(PARTS)) == len(rows)
    for row, request in zip(rows, requests, strict=True):
        assert tuple(row["completion_ids"]) == written_ids(request)
        assert tuple(row["prompt_ids"]) == request.prompt_ids
        assert (row["seed"], row["source"]) == (request.seed, request.source)
        assert row["temperature"] == pytest.approx(request.temperature)
        assert (row["prompt_hash"], row["finish_reason"]) == (request.prompt_hash, "stop")


@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(0, 20), min_size=1, max_size=3).map(sorted),
    sizes=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    worlds=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    kills=st.lists(st.integers(0, 9), max_size=3),
    in_flight=st.integers(1, 6),
)
def test_killed_resumed_and_grown_by_any_number_of_processes(
    rows: list[int], sizes: list[int], worlds: list[int], kills: list[int], in_flight: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        for count, size, world in zip(rows, sizes, worlds, strict=False):
            requests = make_requests(count)
            for seed, kill in enumerate([*kills, None]):
                before = set(stored_indices(folder).tolist())
                started: list[int] = []

                def work(rank: int, seed: int = seed, kill: int | None = kill) -> None:
                    engine = FakeEngine(in_flight=in_flight, seed=seed + rank, dies_after=kill)
                    try:
                        write_rows(engine, requests, folder)  # noqa: B023
                    finally:
                        started.extend(engine.started)  # noqa: B023

                in_processes(world if kill is None else 1 + world % 3, work, size)
                assert before.isdisjoint(started)  # a stored row is not generated again
                assert len(set(started)) == len(started)  # nor by two processes
            check_complete(folder, requests)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_part_is_named_and_only_its_rows_are_made_again(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ROWS_PER_PART", 20)
    folder, requests = tmp_path / "set", make_requests(60)
    write_rows(FakeEngine(), requests, folder)
    part = folder / "part-00000-00001.parquet"
    lost = stored_indices(folder).tolist()
    part.write_bytes(part.read_bytes()[:-9] if damage == "cut" else b"other")
    message = r"part-00000-00001\.parquet: damaged \(.*Delete this file and run again"
    with pytest.raises(FastDraftError, match=message):
        list(iter_rows(folder))
    part.unlink()
    lost = sorted(set(lost) - set(stored_indices(folder).tolist()))
    again = FakeEngine(in_flight=1)
    write_rows(again, requests, folder)
    assert again.started == lost
    assert len(lost) == 20
    check_complete(folder, requests)


def test_a_folder_without_parts_is_not_a_set(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match="not a generated set"):
        kept_indices(tmp_path)
    write_rows(FakeEngine(), [], tmp_path)
    assert list(iter_rows(tmp_path)) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [9]

    def write_table(*args: Any, **given: Any) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **given)

    real = pyarrow.parquet.write_table
    monkeypatch.setattr(pyarrow.parquet, "write_table", write_table)
    monkeypatch.setattr(parts, "ROWS_PER_PART", 4)
    requests, folder = make_requests(60), tmp_path / "set"
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device"):
            write_rows(FakeEngine(), requests, folder)
        room[0] = 0
    room[0] = 100
    again = FakeEngine()
    write_rows(again, requests, folder)
    assert len(again.started) == 60 - 9 * 4
    check_complete(folder, requests)


class Clock:
    """Time that passes only while rows are generated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(parts, "LEAST_TOKENS", 0)
        monkeypatch.setattr(parts, "time", SimpleNamespace(monotonic=lambda: self.now))

    def engine(self, seconds: float, **given: Any) -> FakeEngine:
        engine = FakeEngine(**given)
        engine.on_begin = lambda: setattr(self, "now", self.now + seconds)
        return engine


def test_when_the_time_is_up_finished_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    engine = clock.engine(30, in_flight=3)
    write_rows(engine, make_requests(40), tmp_path / "set", max_minutes=5)
    # 5 minutes are 10 rows of half a minute. The last ones are not started, so that none that is
    # in flight is cut off.
    assert 7 <= len(engine.started) < 10
    assert len(engine.finished) == len(engine.started)
    assert [row["index"] for row in iter_rows(tmp_path / "set")] == sorted(engine.finished)
    again = clock.engine(30)
    write_rows(again, make_requests(40), tmp_path / "set", max_minutes=5)
    assert again.started == []


@given(
    prompts=st.integers(0, 9),
    temperatures=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4),
    each=st.sampled_from(["one", "all"]),
)
def test_requests_are_every_combination_once(
    prompts: int, temperatures: list[float], each: Any
) -> None:
    requests = build_requests(
        [(number,) for number in range(prompts)],
        temperatures=temperatures,
        temperatures_per_prompt=each,
        max_new_tokens=5,
        seed=7,
        source="s",
        top_p=0.9,
    )
    wanted = [
        (number, temperature)
        for number in range(prompts)
        for temperature in (
            temperatures if each == "all" else [temperatures[number % len(temperatures)]]
        )
    ]
    found = list(requests)
    assert [(r.prompt_ids[0], r.temperature) for r in found] == wanted
    assert [r.index for r in found] == list(range(len(requests)))
    assert len({r.seed for r in found}) == len(found)
    assert all(r.top_p == (0.9 if r.temperature else 1.0) for r in found)
