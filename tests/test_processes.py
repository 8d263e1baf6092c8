"""Two real processes: values broadcast from the main one, and its errors raised in both."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastdraft_hf import FastDraftError
from fastdraft_hf._processes import barrier, broadcast, is_main, on_main, rank, started, world

_TWO = """
from fastdraft_hf._processes import MainProcessError, barrier, broadcast, is_main, on_main, rank
from fastdraft_hf._processes import start, stop, world
start(cpu=True)
assert broadcast({"rank": rank()}) == {"rank": 0}
assert on_main(lambda: [rank(), world()]) == [0, 2]
def fail():
    raise ValueError("no room")
try:
    on_main(fail)
except MainProcessError as error:
    assert not is_main() and str(error) == "no room"
except ValueError as error:
    assert is_main() and str(error) == "no room"
else:
    raise AssertionError
barrier()
print(f"done{rank()}", flush=True)
stop()
"""


def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(_TWO, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launch, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    # The two write at the same time, so line breaks may come late.
    assert sorted(re.findall(r"done\d", result.stdout)) == ["done0", "done1"]


def test_one_process_needs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world(), is_main(), started()) == (0, 1, True, False)
    assert broadcast(3) == 3
    assert on_main(lambda: "value") == "value"
    barrier()


@pytest.mark.parametrize(("index", "count"), [("2", "2"), ("x", "2"), ("0", "-1"), ("0", "0")])
def test_an_invalid_rank_is_refused(
    monkeypatch: pytest.MonkeyPatch, index: str, count: str
) -> None:
    monkeypatch.setenv("RANK", index)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(FastDraftError, match=f"RANK={index} and WORLD_SIZE={count}: RANK must be"):
        rank()
