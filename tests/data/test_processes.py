"""A set written by real processes: killed at any moment, several at once, one of them missing."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest

from fastdraft_hf._atomic import sha256_file
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import Process, this_process, wait_until
from fastdraft_hf.data.generated import MANIFEST, read_rows

from .writer import ids_of, make_requests

WRITER = Path(__file__).with_name("writer.py")


def start(*arguments: object, env: Mapping[str, str] = {}, command: Any = None) -> Any:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [*(command or [sys.executable]), str(WRITER), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def world(index: int, count: int) -> dict[str, str]:
    return {"RANK": str(index), "WORLD_SIZE": str(count)}


def finish(*processes: Any) -> list[str]:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def kill(process: Any, seconds: float) -> None:
    """SIGKILL ``seconds`` after it began to write."""
    assert process.stdout.readline() == "writing\n"
    time.sleep(seconds)
    process.kill()
    process.communicate()
    assert process.returncode == -9


def check_whole(folder: Path, rows: int, cache: Path) -> None:
    """Every (prompt, temperature, sample) once, with the ids of its seed, in sound shards."""
    requests, found = make_requests(rows), read_rows(folder)
    assert [row["index"] for row in found] == list(range(rows))
    for row, request in zip(found, requests, strict=True):
        assert tuple(row["completion_ids"]) == ids_of(request)
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


def test_killed_twenty_times(tmp_path: Path) -> None:
    folder, source = tmp_path / "set", random.Random(11)
    arguments = (folder, 2000, 0.001, 20)
    for _ in range(20):
        kill(start(*arguments), source.uniform(0, 0.6))
        assert not (folder / MANIFEST).exists()
    assert 5 < len(list(folder.glob("part-*.parquet"))) < 100
    finish(start(*arguments))
    check_whole(folder, 2000, tmp_path / "cache")
    begun = (tmp_path / "set.log").read_text().split()
    # A kill costs the shard that was being written, and no more.
    assert len(begun) <= 2000 + 20 * 20


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes(tmp_path: Path, count: int) -> None:
    folder = tmp_path / "set"
    arguments = (folder, 205, 0.001, 10)
    outputs = finish(*(start(*arguments, env=world(index, count)) for index in range(count)))
    assert [f"process {i} of {count}: done" in out for i, out in enumerate(outputs)] == [
        True
    ] * count
    check_whole(folder, 205, tmp_path / "cache")
    begun = [int(line) for line in (tmp_path / "set.log").read_text().split()]
    assert sorted(begun) == list(range(205))  # no row was written by two


def test_killed_among_several_and_gone_on_with_by_another_number(tmp_path: Path) -> None:
    folder, source = tmp_path / "set", random.Random(3)
    arguments = (folder, 905, 0.002, 10)
    for count in (3, 2, 3):
        processes = [start(*arguments, env=world(index, count)) for index in range(count)]
        for process in source.sample(processes, count):
            kill(process, source.uniform(0, 0.05))
    assert not (folder / MANIFEST).exists()
    finish(*(start(*arguments, env=world(index, 2)) for index in range(2)))
    check_whole(folder, 905, tmp_path / "cache")


def test_torchrun(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    finish(start(folder, 45, 0.001, 10, command=[*launch, "--rdzv-endpoint", "127.0.0.1:0"]))
    check_whole(folder, 45, tmp_path / "cache")


@pytest.mark.parametrize(
    ("index", "message"),
    [(0, "process 1 of 2 to finish its rows"), (1, "process 0 of 2 to begin the set")],
)
def test_who_waits_in_vain_says_for_whom(tmp_path: Path, index: int, message: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    alone = start(folder, 45, 0.001, 10, 0.02, env=world(index, 2))
    output, _ = alone.communicate(timeout=60)
    assert alone.returncode == 1
    assert f"waited 0.02 minutes for {message}" in output
    assert str(folder) in output
    finish(start(folder, 45, 0.001, 10))  # and one process alone goes on with it
    check_whole(folder, 45, tmp_path / "cache")


def test_a_late_process_finds_the_stage_finished(tmp_path: Path) -> None:
    """The first renamed the stage's folder: nothing of it may be made again."""
    finish(start(tmp_path / "stage" / "set", 5, 0, 10))
    (tmp_path / "stage").rename(tmp_path / "finished")
    late = start(tmp_path / "stage" / "set", 5, 0, 10, env=world(1, 2))
    output, _ = late.communicate(timeout=60)
    assert late.returncode == 1
    assert "FileNotFoundError" in output
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, Process(0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, Process(0, 1)),
        (world(0, 1), Process(0, 1)),
        (world(2, 3), Process(2, 3)),
    ],
)
def test_who_this_is(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], found: Process) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert this_process() == found


@pytest.mark.parametrize("env", [world(2, 2), {"RANK": "x"}, {"RANK": "0", "WORLD_SIZE": "-1"}])
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
