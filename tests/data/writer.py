"""Writes a set as a process of its own: python writer.py FOLDER ROWS SECONDS_A_ROW ROWS_PER_SHARD.

Which of how many processes it is comes from RANK and WORLD_SIZE. `test_processes.py` kills it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fastdraft_hf._processes import this_process
from fastdraft_hf.data.engines import Completion
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


def main() -> None:
    folder, rows, seconds, size = sys.argv[1:5]
    patience = float(sys.argv[5]) if len(sys.argv) > 5 else 1.0
    write_rows(
        SlowEngine(float(seconds), Path(f"{folder}.log")),
        make_requests(int(rows)),
        Path(folder),
        rows_per_shard=int(size),
        patience_minutes=patience,
    )
    print(f"{this_process()}: done", flush=True)


if __name__ == "__main__":
    main()
