"""With a draft only where that is faster: the first texts are written both ways and timed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from fastdraft_hf.data.engines import Completion, Engine
from fastdraft_hf.data.requests import Request

logger = logging.getLogger(__name__)

# A draft that gains less is not worth its memory, and a short probe cannot tell it from nothing.
LEAST_GAIN = 1.05


@dataclass
class _Way:
    """One way of writing, and what the probe has seen of it."""

    label: str
    open: Callable[[], Engine]
    left: int
    engine: Engine | None = None
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class FasterEngine:
    """Writes ``texts`` texts without a draft and as many with it, then goes on the faster way.

    The texts of the probe are kept like all others. The probe is repeated by every run, and its
    outcome is logged.

    Args:
        plain: opens the engine without the draft.
        drafting: opens it with the draft.
        texts: of the probe, each way: what the engine writes at once.
        clock: seconds.
    """

    def __init__(
        self,
        plain: Callable[[], Engine],
        drafting: Callable[[], Engine],
        texts: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._ways = [_Way("without", plain, texts), _Way("with", drafting, texts)]
        self._clock = clock
        self._chosen: Engine | None = None
        # Both are opened now: what is wrong with either is said before any text is written.
        for way in self._ways:
            way.engine = way.open()
        self.name = self._engine(self._ways[0]).name

    @staticmethod
    def _engine(way: _Way) -> Engine:
        assert way.engine is not None
        return way.engine

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        waiting = iter(requests)
        if self._chosen is None:
            for way in self._ways:
                yield from self._timed(way, list(islice(waiting, way.left)), on_tokens)
            if not any(way.left for way in self._ways):
                self._choose()
        # Too few texts to decide: none are left, and the next set goes on with the probe.
        if self._chosen is not None:
            yield from self._chosen.generate(waiting, on_tokens)

    def _timed(
        self, way: _Way, requests: list[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        texts = self._engine(way).generate(requests, on_tokens)
        while True:
            begun = self._clock()
            completion = next(texts, None)
            way.seconds += self._clock() - begun
            if completion is None:
                break
            way.tokens += len(completion.ids)
            way.left -= 1
            yield completion

    def _choose(self) -> None:
        plain, drafting = self._ways
        chosen = drafting if drafting.rate > LEAST_GAIN * plain.rate else plain
        logger.info(
            "generate: %.0f tokens/s without the draft, %.0f with it: going on %s it",
            plain.rate,
            drafting.rate,
            chosen.label,
        )
        self._chosen = chosen.engine
        for way in self._ways:
            way.engine = None  # the other's memory goes back
