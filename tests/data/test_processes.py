"""A set written by real processes: killed at any moment, several at once, one of them missing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from fastdraft_hf._atomic import sha256_file
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import Process, this_process, wait_until
from fastdraft_hf.data.generated import read_rows, write_rows
from fastdraft_hf.data.shards import MANIFEST

from .writer import SlowEngine, ids_of, make_requests

WRITER = Path(__file__).with_name("writer.py")


class Writer:
    """A process that forks writers, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WRITER)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, folder: Path, *arguments: object, index: int = 0, count: int = 1) -> Writer:
        self.output = folder.with_name(f"{folder.name}.out-{index}-{time.time_ns()}")
        order = {
            "arguments": [str(folder), *map(str, arguments)],
            "world": [str(index), str(count)],
            "output": [str(self.output)],
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._pid = int(self._line())
        return self

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def kill(self, seconds: float) -> None:
        """SIGKILL ``seconds`` after it began to write."""
        while not self.output.exists() or "writing" not in self.output.read_text():
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(self._pid, signal.SIGKILL)
        assert int(self._line()) == -signal.SIGKILL, self.output.read_text()

    def end(self) -> tuple[int, str]:
        """Wait for it; return its exit status and what it printed."""
        return int(self._line()), self.output.read_text()

    def finish(self) -> str:
        status, output = self.end()
        assert status == 0, output
        return output

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def writers() -> Iterator[list[Writer]]:
    made = [Writer() for _ in range(3)]
    yield made
    for writer in made:
        writer.close()


def check_whole(folder: Path, rows: int, cache: Path, *, known: bool = True) -> None:
    """Every (prompt, temperature, sample) once, with the ids of its seed, in sound shards."""
    requests, found = make_requests(rows), read_rows(folder)
    assert [row["index"] for row in found] == list(range(rows))
    for row, request in zip(found, requests, strict=True):
        assert not known or tuple(row["completion_ids"]) == ids_of(request)
        assert (tuple(row["prompt_ids"]), row["seed"]) == (request.prompt_ids, request.seed)
        assert row["temperature"] == pytest.approx(request.temperature)
        assert (row["sample"], row["prompt_hash"]) == (request.sample, request.prompt_hash)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["rows"] == rows
    assert {p.name for p in folder.iterdir()} == {MANIFEST, *manifest["shards"]}
    for name, digest in manifest["shards"].items():
        assert sha256_file(folder / name) == digest
    files = [str(folder / name) for name in manifest["shards"]]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    assert loaded.num_rows == rows


def test_killed_twenty_times(tmp_path: Path, writers: list[Writer]) -> None:
    folder, source = tmp_path / "set", random.Random(11)
    arguments = (folder, 1000, 0.001, 10)
    for _ in range(20):
        writers[0].start(*arguments).kill(source.uniform(0, 0.07))
        assert not (folder / MANIFEST).exists()
    assert 3 < len(list(folder.glob("part-*.parquet"))) < 100
    writers[0].start(*arguments).finish()
    check_whole(folder, 1000, tmp_path / "cache")
    begun = (tmp_path / "set.log").read_text().split()
    # A kill costs the shard that was being written, and no more.
    assert len(begun) <= 1000 + 20 * 10


@pytest.mark.slow
def test_killed_twenty_times_with_the_real_target(tmp_path: Path, writers: list[Writer]) -> None:
    pytest.importorskip("openvino_genai")
    pytest.importorskip("optimum.intel")
    folder, source = tmp_path / "set", random.Random(12)
    arguments = (folder, 2000, -1, 8)
    for _ in range(20):
        writers[0].start(*arguments).kill(source.uniform(0, 1.5))
        assert not (folder / MANIFEST).exists()
    kept = len(list(folder.glob("part-*.parquet")))
    assert 3 < kept < 250
    writers[0].start(*arguments).finish()
    check_whole(folder, 2000, tmp_path / "cache", known=False)
    rows = read_rows(folder)
    assert all(1 <= len(row["completion_ids"]) <= 8 for row in rows)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes(tmp_path: Path, writers: list[Writer], count: int) -> None:
    folder = tmp_path / "set"
    for index in range(count):
        writers[index].start(folder, 205, 0.001, 10, index=index, count=count)
    for index in range(count):
        assert f"process {index} of {count}: done" in writers[index].finish()
    check_whole(folder, 205, tmp_path / "cache")
    begun = [int(line) for line in (tmp_path / "set.log").read_text().split()]
    assert sorted(begun) == list(range(205))  # no row was written by two


def test_killed_among_several_and_gone_on_with_by_another_number(
    tmp_path: Path, writers: list[Writer]
) -> None:
    folder, source = tmp_path / "set", random.Random(3)
    for count in (3, 2, 3, 1, 2):
        for index in range(count):
            writers[index].start(folder, 905, 0.001, 10, index=index, count=count)
        for writer in source.sample(writers[:count], count):
            writer.kill(source.uniform(0, 0.05))
    assert not (folder / MANIFEST).exists()
    assert list(folder.glob("part-*.parquet"))
    for index in range(2):
        writers[index].start(folder, 905, 0.001, 10, index=index, count=2)
    for index in range(2):
        writers[index].finish()
    check_whole(folder, 905, tmp_path / "cache")


def test_torchrun(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    arguments = ["--rdzv-endpoint", "127.0.0.1:0", str(WRITER), str(folder), "45", "0.001", "10"]
    subprocess.run([*launch, *arguments], env=environment(), check=True, timeout=120)
    check_whole(folder, 45, tmp_path / "cache")


@pytest.mark.parametrize(
    ("index", "message"),
    [(0, "process 1 of 2 to finish its rows"), (1, "process 0 of 2 to begin the set")],
)
def test_who_waits_in_vain_says_for_whom(
    tmp_path: Path, writers: list[Writer], index: int, message: str
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    status, output = writers[0].start(folder, 45, 0.001, 10, 0.01, index=index, count=2).end()
    assert status == 1
    assert f"waited 0.01 minutes for {message}" in output
    assert str(folder) in output
    writers[0].start(folder, 45, 0.001, 10).finish()  # and one process alone goes on with it
    check_whole(folder, 45, tmp_path / "cache")


def test_a_late_process_finds_the_stage_finished(tmp_path: Path, writers: list[Writer]) -> None:
    """The first renamed the stage's folder: nothing of it may be made again."""
    (tmp_path / "stage").mkdir()
    writers[0].start(tmp_path / "stage" / "set", 5, 0, 10).finish()
    (tmp_path / "stage").rename(tmp_path / "finished")
    with pytest.raises(FileNotFoundError):
        write_rows(
            SlowEngine(0, tmp_path / "log"),
            make_requests(5),
            tmp_path / "stage" / "set",
            process=Process(1, 2),
        )
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, Process(0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, Process(0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Process(0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, Process(2, 3)),
    ],
)
def test_who_this_is(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], found: Process) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert this_process() == found


@pytest.mark.parametrize(
    "env",
    [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}, {"RANK": "0", "WORLD_SIZE": "-1"}],
)
def test_nobody(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FastDraftError, match="name no process"):
        this_process()


def test_signs_of_life_are_waited_with(tmp_path: Path) -> None:
    asked = [0]

    def done() -> bool:
        asked[0] += 1
        (tmp_path / "sign").write_text("." * asked[0])
        os.utime(tmp_path / "sign", ns=(asked[0], asked[0]))
        return asked[0] == 30

    wait_until(done, tmp_path, lambda: "nobody", 0.0, poll_seconds=0.001)
    with pytest.raises(FastDraftError, match="waited 0 minutes for somebody, and nothing in the"):
        wait_until(lambda: False, tmp_path, lambda: "somebody", 0.0, poll_seconds=0.001)
