from __future__ import annotations

import errno
import itertools
import json
import random
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import generated, shards
from fastdraft_hf.data.engines import Completion
from fastdraft_hf.data.generated import read_rows, write_rows
from fastdraft_hf.data.requests import Request
from fastdraft_hf.data.shards import MANIFEST, read_shard

from .fakes import FakeEngine, Killed, make_requests, written_ids


def check_whole(folder: Path, requests: list[Request]) -> None:
    rows = read_rows(folder)
    assert [row["index"] for row in rows] == [r.index for r in requests]
    for row, request in zip(rows, requests, strict=True):
        assert tuple(row["completion_ids"]) == written_ids(request)
        assert tuple(row["prompt_ids"]) == request.prompt_ids
        assert (row["seed"], row["source"]) == (request.seed, request.source)
        assert row["temperature"] == pytest.approx(request.temperature)
        assert row["prompt_hash"] == request.prompt_hash
        assert row["finish_reason"] == "stop"


@given(
    rows=st.integers(0, 23),
    size=st.integers(1, 9),
    in_flight=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_every_order_of_finishing(rows: int, size: int, in_flight: int, seed: int) -> None:
    requests = make_requests(rows)
    seen: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        write_rows(
            FakeEngine(in_flight=in_flight, seed=seed),
            requests,
            folder,
            rows_per_shard=size,
            on_progress=lambda *step: seen.append(step),
        )
        check_whole(folder, requests)
        assert len(list(folder.glob("*.parquet"))) == -(-rows // size)
        assert sorted(p.name for p in folder.iterdir() if p.suffix != ".parquet") == [MANIFEST]
    assert sum(step[0] for step in seen) == rows
    assert sum(step[1] for step in seen) == sum(len(written_ids(r)) for r in requests)


@given(
    rows=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    in_flight=st.integers(1, 6),
    kills=st.lists(st.integers(0, 20), max_size=4),
)
def test_killed_and_resumed(rows: int, sizes: list[int], in_flight: int, kills: list[int]) -> None:
    requests = make_requests(rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        shard_sizes = itertools.cycle(sizes)  # a user may change the number between two runs
        whole: set[int] = set()
        for seed, kill in enumerate(kills):
            engine = FakeEngine(in_flight=in_flight, seed=seed, dies_after=kill)
            try:
                write_rows(engine, requests, folder, rows_per_shard=next(shard_sizes))
            except Killed:
                with pytest.raises(FastDraftError, match="no finished set"):
                    read_rows(folder)
            assert not whole & set(engine.begun)  # what lies in a shard is not written again
            whole = {r["index"] for p in folder.glob("part-*.parquet") for r in read_shard(p)}
        write_rows(FakeEngine(in_flight=in_flight), requests, folder, rows_per_shard=sizes[0])
        check_whole(folder, requests)


@pytest.mark.parametrize("rows", [1, 5, 6])
def test_every_single_kill_point(tmp_path: Path, rows: int) -> None:
    requests = make_requests(rows)
    for kill in range(rows):
        folder = tmp_path / f"{kill}"
        with pytest.raises(Killed):
            write_rows(FakeEngine(dies_after=kill), requests, folder, rows_per_shard=2)
        write_rows(FakeEngine(seed=kill), requests, folder, rows_per_shard=2)
        check_whole(folder, requests)


STEPS = [
    (generated, "write_shard"),
    (generated, "write_json"),
    (generated, "read_facts"),
    (generated, "_tidy"),
    (shards, "sha256_file"),
    (shards, "write_json"),
]


@pytest.mark.parametrize(("module", "function"), STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_killed_while_writing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    function: str,
    when: str,
    call: int,
) -> None:
    real = getattr(module, function)
    calls = itertools.count(1)

    def dying(*args: Any) -> Any:
        dies = next(calls) == call
        if dies and when == "before":
            raise Killed
        result = real(*args)
        if dies:
            raise Killed
        return result

    requests = make_requests(7)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, dying)
        try:
            write_rows(FakeEngine(), requests, tmp_path / "set", rows_per_shard=3)
        except Killed:
            pass
        else:
            assert (function, call > 1) == ("_tidy", True)  # there is one call only
    write_rows(FakeEngine(seed=1), requests, tmp_path / "set", rows_per_shard=3)
    check_whole(tmp_path / "set", requests)
    assert {p.suffix for p in (tmp_path / "set").iterdir()} == {".parquet", ".json"}
    assert [p.name for p in (tmp_path / "set").glob("*.json")] == [MANIFEST]


def test_what_a_kill_left_half_written_is_no_shard(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / ".part-00000.parquet.abc.tmp").write_bytes(b"half")
    write_rows(FakeEngine(), make_requests(3), folder, rows_per_shard=2)
    check_whole(folder, make_requests(3))


def test_a_finished_set_is_not_written_again(tmp_path: Path) -> None:
    requests = make_requests(4)
    write_rows(FakeEngine(), requests, tmp_path / "set")
    again = FakeEngine()
    write_rows(again, requests, tmp_path / "set")
    assert again.begun == []


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "set"
    write_rows(FakeEngine(), make_requests(6), folder, rows_per_shard=2)
    shard = folder / "part-00001.parquet"
    data = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(FastDraftError, match=r"part-00001\.parquet: missing or damaged"):
        read_rows(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "facts gone", "facts cut"])
def test_damage_in_an_unfinished_set_is_found_and_mended(tmp_path: Path, damage: str) -> None:
    folder, requests = tmp_path / "set", make_requests(12)
    with pytest.raises(Killed):
        write_rows(
            FakeEngine(in_flight=1, dies_after=9), requests, folder, rows_per_shard=2
        )  # shards 0 to 3
    shard = folder / ("part-00001.json" if "facts" in damage else "part-00001.parquet")
    data = bytearray(shard.read_bytes())
    if damage.endswith("gone"):
        shard.unlink()
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    again = FakeEngine()
    write_rows(again, requests, folder, rows_per_shard=2)
    assert sorted(again.begun) == [2, 3, 8, 9, 10, 11]
    check_whole(folder, requests)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_an_engines_error_loses_no_finished_row(tmp_path: Path, rows: int) -> None:
    class Failing(FakeEngine):
        def generate(self, requests: Any, on_tokens: Any) -> Any:
            for number, completion in enumerate(super().generate(requests, on_tokens)):
                if number == rows:
                    raise FastDraftError("the server died")
                yield completion

    folder, requests = tmp_path / "set", make_requests(12)
    for _ in range(2):  # and again, with what was kept of the first time
        with pytest.raises(FastDraftError, match="the server died"):
            write_rows(Failing(), requests, folder, rows_per_shard=4)
        if 2 * rows >= 12:
            break
    again = FakeEngine()
    write_rows(again, requests, folder, rows_per_shard=4)
    assert len(again.begun) == max(0, 12 - rows * (2 if 2 * rows < 12 else 1))
    check_whole(folder, requests)


@pytest.mark.parametrize("faulty", ["twice", "left out"])
def test_an_engine_that_breaks_its_word_is_found(tmp_path: Path, faulty: str) -> None:
    class Faulty(FakeEngine):
        def generate(self, requests: Any, on_tokens: Any) -> Any:
            done = list(super().generate(requests, on_tokens))
            yield from done[:-1] if faulty == "left out" else [*done, done[0]]

    message = "wrote text 0 twice" if faulty == "twice" else "left 1 texts unwritten"
    with pytest.raises(RuntimeError, match=message):
        write_rows(Faulty(in_flight=1), make_requests(6), tmp_path / "set", rows_per_shard=4)


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one: a file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        fill_up(disk / "set", disk)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where nothing can be mounted: writing fails as on a full disk."""
    room = [9]

    def write_table(*args: Any, **given: Any) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **given)

    real = pyarrow.parquet.write_table
    monkeypatch.setattr(pyarrow.parquet, "write_table", write_table)
    requests, folder = make_requests(60), tmp_path / "set"
    for _ in range(2):
        with pytest.raises(FastDraftError, match=r"set: no room left to write .*go on"):
            write_rows(FakeEngine(), requests, folder, rows_per_shard=4)
        room[0] = 0
    room[0] = 100
    again = FakeEngine()
    write_rows(again, requests, folder, rows_per_shard=4)
    assert len(again.begun) <= 60 - 9 * 4
    check_whole(folder, requests)


def fill_up(folder: Path, disk: Path) -> None:
    source = random.Random(0)
    requests = [
        Request(i, tuple(source.randrange(2**31) for _ in range(400)), 0.0, i, 8, "fake")
        for i in range(256)
    ]
    with pytest.raises(FastDraftError) as error:
        write_rows(FakeEngine(), requests, folder, rows_per_shard=8)
    assert str(folder) in str(error.value)
    assert "no room left to write" in str(error.value)
    finished = {r["index"] for p in folder.glob("part-*.parquet") for r in read_shard(p)}
    assert 8 <= len(finished) < 256
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    again = FakeEngine()
    write_rows(again, requests, folder, rows_per_shard=8)
    assert not finished & set(again.begun)
    check_whole(folder, requests)


def test_memory_holds_what_is_being_written_only(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Completion] = weakref.WeakSet()
    most = [0]

    class Watched(FakeEngine):
        def generate(self, requests: Any, on_tokens: Any) -> Any:
            for completion in super().generate(requests, on_tokens):
                alive.add(completion)
                most[0] = max(most[0], len(alive))
                yield completion

    class Lazy(Sequence[Request]):
        """Makes requests when they are asked for, so that only the writer could hold them."""

        def __len__(self) -> int:
            return 600

        def __getitem__(self, index: Any) -> Any:
            if not 0 <= index < 600:
                raise IndexError
            return Request(index, (1, index % 5, 2), 0.5 * (index % 3), 100 + index, 8, "fake")

    rows_open: list[int] = []
    real = shards.write_shard

    def counting(path: Path, rows: Any) -> None:
        rows = list(rows)
        rows_open.append(len(rows))
        real(path, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "write_shard", counting)
        write_rows(Watched(in_flight=8), Lazy(), tmp_path / "set", rows_per_shard=16)
    assert most[0] <= 2
    assert max(rows_open) == 16
    check_whole(tmp_path / "set", list(Lazy()))


def test_no_time_writes_nothing(tmp_path: Path) -> None:
    engine = FakeEngine()
    write_rows(engine, make_requests(5), tmp_path / "set", max_minutes=0)
    assert engine.begun == []
    assert read_rows(tmp_path / "set") == []


def test_what_is_begun_when_the_time_is_up_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(generated, "time", SimpleNamespace(monotonic=lambda: now[0]))
    engine = FakeEngine(in_flight=3, seed=5)

    def half_a_minute() -> None:
        now[0] += 30

    engine.on_begin = half_a_minute
    write_rows(engine, make_requests(40), tmp_path / "set", rows_per_shard=4, max_minutes=5)
    rows = read_rows(tmp_path / "set")
    # 5 minutes are 10 texts of half a minute; the one begun on the last second counts too.
    assert [row["index"] for row in rows] == sorted(engine.begun) == list(range(11))
    manifest = json.loads((tmp_path / "set" / MANIFEST).read_text())
    assert manifest["rows"] == 11
    assert manifest["seconds"] == 330


def test_the_time_counts_over_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(generated, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def minute() -> None:
        now[0] += 60

    first = FakeEngine(in_flight=1, dies_after=4)
    first.on_begin = minute
    with pytest.raises(Killed):
        write_rows(first, make_requests(40), tmp_path / "set", rows_per_shard=2, max_minutes=6)
    now[0] += 10_000  # the time between two runs is not writing time
    second = FakeEngine(in_flight=1)
    second.on_begin = minute
    write_rows(second, make_requests(40), tmp_path / "set", rows_per_shard=2, max_minutes=6)
    assert second.begun == [4, 5, 6]
    assert [row["index"] for row in read_rows(tmp_path / "set")] == list(range(7))


def test_ids_are_kept_as_generated(tmp_path: Path, tiny_tokenizer: Any) -> None:
    letters = tiny_tokenizer.convert_tokens_to_ids(["t", "h", "e"])
    text = tiny_tokenizer.decode(letters)
    assert tiny_tokenizer.encode(text) != letters  # the tokenizer itself would merge them

    class Spelling(FakeEngine):
        def generate(self, requests: Any, on_tokens: Any) -> Any:
            for request in requests:
                yield Completion(request, tuple(letters), "length")

    write_rows(Spelling(), make_requests(2), tmp_path / "set")
    assert [row["completion_ids"] for row in read_rows(tmp_path / "set")] == [letters, letters]


def test_shards_are_a_data_set_of_their_own(tmp_path: Path) -> None:
    requests = make_requests(5)
    write_rows(FakeEngine(), requests, tmp_path / "set", rows_per_shard=2)
    files = [str(p) for p in sorted((tmp_path / "set").glob("*.parquet"))]
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["completion_ids"] for row in loaded] == [list(written_ids(r)) for r in requests]
    assert loaded.column_names == [
        *["index", "source", "prompt_ids", "completion_ids", "finish_reason", "temperature"],
        *["top_p", "sample", "seed", "prompt_hash"],
    ]
