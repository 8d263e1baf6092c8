"""Writes a set as a process of its own: python writer.py FOLDER ROWS SECONDS_A_ROW ROWS_PER_SHARD.

Which of how many processes it is comes from RANK and WORLD_SIZE. `test_processes.py` kills it.
Without arguments it imports what is needed and forks a writer for every line it reads, so that
hundreds of processes can be started and killed in a test.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from fastdraft_hf._processes import this_process
from fastdraft_hf.data.engines import Completion, Engine
from fastdraft_hf.data.generated import write_rows
from fastdraft_hf.data.requests import Request, requests_for

STOP = 2


def make_requests(rows: int) -> list[Request]:
    prompts = [(1, index % 7, 3) for index in range(rows)]
    return requests_for(
        prompts, temperatures=[0.0, 0.6, 0.8, 1.0], max_new_tokens=8, seed=5, source="killed"
    )


def ids_of(request: Request) -> tuple[int, ...]:
    return (*(request.seed % 97 + i for i in range(3, 3 + request.index % 5)), STOP)


class SlowEngine:
    name = "slow"

    def __init__(self, seconds: float, log: Path) -> None:
        self.seconds, self.log = seconds, log

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        print("writing", flush=True)
        for request in requests:
            time.sleep(self.seconds)
            with self.log.open("a") as log:  # one short line: whole, whoever else appends
                log.write(f"{request.index}\n")
            on_tokens(len(ids_of(request)))
            yield Completion(request, ids_of(request), "stop")


def open_engine(seconds: float, log: Path) -> Engine:
    """Open the slow engine, or with no seconds a row the real target through OpenVINO."""
    if seconds >= 0:
        return SlowEngine(seconds, log)
    from fastdraft_hf.data.engines.openvino import OpenVINOEngine
    from fastdraft_hf.export.openvino import cached_openvino
    from fastdraft_hf.target.embedded import embedded_target

    engine = OpenVINOEngine(cached_openvino(Path(embedded_target()), "int8"), {0, STOP}, 8)
    print("writing", flush=True)
    return engine


def main(arguments: list[str]) -> None:
    folder, rows, seconds, size, *further = arguments
    write_rows(
        open_engine(float(seconds), Path(f"{folder}.log")),
        make_requests(int(rows)),
        Path(folder),
        rows_per_shard=int(size),
        patience_minutes=float(further[0]) if further else 1.0,
    )
    print(f"{this_process()}: done", flush=True)


def fork(order: dict[str, list[str]]) -> None:
    """Do what an order says in a process of its own; print its number, then how it ended."""
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        return
    output = os.open(order["output"][0], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = order["world"]
        main(order["arguments"])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1:])
    else:
        # What pyarrow imports at its first table must not be a writer's time.
        pyarrow.Table.from_pylist([{"a": [1]}])
        for line in sys.stdin:
            fork(json.loads(line))
