"""An engine that writes known texts in any order and dies when it is told to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from fastdraft_hf.data.engines import Completion
from fastdraft_hf.data.requests import Request


class Killed(BaseException):
    """Stands for a kill: no `except Exception` may swallow it."""


def make_requests(count: int, source: str = "fake") -> list[Request]:
    return [Request(i, (1, i % 5, 2), 0.5 * (i % 3), 100 + i, 8, source) for i in range(count)]


def written_ids(request: Request) -> tuple[int, ...]:
    return (request.index, *range(request.index % 4), 2)


class FakeEngine:
    name = "fake"

    def __init__(self, *, in_flight: int = 4, seed: int = 0, dies_after: int | None = None) -> None:
        self.in_flight, self.dies_after = in_flight, dies_after
        self.random = random.Random(seed)
        self.begun: list[int] = []
        self.finished: list[int] = []
        self.on_begin: Callable[[], None] = lambda: None

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        waiting = iter(requests)
        running: list[Request] = []
        while True:
            for request in islice(waiting, self.in_flight - len(running)):
                self.begun.append(request.index)
                running.append(request)
                self.on_begin()
            if not running:
                return
            if self.dies_after is not None and len(self.finished) >= self.dies_after:
                raise Killed
            request = running.pop(self.random.randrange(len(running)))
            ids = written_ids(request)
            on_tokens(len(ids))
            self.finished.append(request.index)
            yield Completion(request, ids, "stop")
