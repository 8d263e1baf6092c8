"""An engine that generates known rows in any order and dies on request, and simulated processes."""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pytest

from fastdraft_hf.data import parts, target_logits
from fastdraft_hf.data.engines import Completion, Request


class Killed(BaseException):
    """Stands for a kill: no `except Exception` may catch it."""


def make_requests(count: int, source: str = "fake") -> list[Request]:
    return [Request(i, (1, i % 5, 2), 0.5 * (i % 3), 100 + i, 8, source) for i in range(count)]


def written_ids(request: Request) -> tuple[int, ...]:
    return (request.index, *range(request.index % 4), 2)


class FakeEngine:
    name = "fake"

    def __init__(self, *, in_flight: int = 4, seed: int = 0, dies_after: int | None = None) -> None:
        self.in_flight, self.dies_after = in_flight, dies_after
        self.random = random.Random(seed)
        self.started: list[int] = []
        self.finished: list[int] = []
        self.on_begin: Callable[[], None] = lambda: None

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        waiting = iter(requests)
        running: list[Request] = []
        while True:
            for request in islice(waiting, self.in_flight - len(running)):
                self.started.append(request.index)
                running.append(request)
                self.on_begin()
            if not running:
                return
            if self.dies_after is not None and len(self.finished) >= self.dies_after:
                raise Killed
            request = running.pop(self.random.randrange(len(running)))
            ids = written_ids(request)
            self.finished.append(request.index)
            yield Completion(request, ids, "stop")
            if on_tokens(len(ids)):
                return


def in_processes(
    count: int, work: Callable[[int], None], rows_per_part: int = 1024
) -> list[BaseException | None]:
    """Call ``work(rank)`` for every rank, one after the other, as processes that share a start.

    What the main process computes is the same for all, though the others run later.
    """
    values: list[Any] = []
    ended: list[BaseException | None] = []
    for rank in range(count):
        calls = iter(range(1000))

        def on_main(function: Callable[[], Any], calls: Iterator[int] = calls) -> Any:
            call = next(calls)
            if call == len(values):
                values.append(function())
            return values[call]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "ROWS_PER_PART", rows_per_part)
            for module in (parts, target_logits):
                patch.setattr(module, "on_main", on_main)
                patch.setattr(module, "barrier", lambda: None)
                patch.setattr(module, "world", lambda: count)
                patch.setattr(module, "rank", lambda rank=rank: rank)
            try:
                work(rank)
                ended.append(None)
            except Killed as kill:
                ended.append(kill)
    return ended
