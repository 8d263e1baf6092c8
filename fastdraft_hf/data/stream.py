"""A mixture of sources that is read while training, resumable at every block."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.packing import Encoder, SourceBlocks
from fastdraft_hf.data.sources import Source, summary_keys

if TYPE_CHECKING:
    from datasets import IterableDataset
    from numpy.typing import NDArray

WINDOW = 256  # blocks that are shuffled together
_WINDOWS_KEPT = 1024  # of which a loader may have fetched ahead


class BlockStream:
    """Packed blocks of a mixture without end. Iterating yields ``{"input_ids": …}``.

    Blocks come in windows. A window has of every source the blocks that its weight asks for,
    counted over all windows so far, shuffled by the seed.

    Args:
        sources: what to read, with weights.
        encode: see `Encoder`.
        length: ids per block.
        seed: of every order.
        generated: folder of the generated sets.
        left_out: hashes of documents that are held out.
        window: blocks per window.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Encoder,
        *,
        length: int,
        seed: int,
        generated: Path | None = None,
        left_out: frozenset[int] = frozenset(),
        window: int = WINDOW,
    ) -> None:
        self._sources, self._encode = list(sources), encode
        self._seed, self._window = seed, window
        self._settings = {"length": length, "generated": generated, "left_out": left_out}
        self._start: dict[str, Any] = {"window": 0, "taken": 0, "given": [0] * len(self._sources)}
        # At the beginning of the last windows of the latest iteration.
        self._states: deque[dict[str, Any]] = deque()

    @property
    def start(self) -> int:
        """Number of blocks before the position at which iterations begin."""
        return int(self._start["window"] * self._window + self._start["taken"])

    def state_dict(self, blocks: int) -> dict[str, Any]:
        """Return the position after ``blocks`` blocks, counted from the stream's beginning.

        It is JSON data. Blocks that a loader fetched beyond it come again. Its ``read`` has the
        facts of every source at the end of the window.

        Raises:
            ValueError: that position is too long ago.
        """
        for state in reversed(self._states):
            if state["window"] * self._window <= blocks:
                return {**state, "taken": blocks - state["window"] * self._window}
        raise ValueError(f"block {blocks}: that position is too long ago")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let iterations begin at a position that `state_dict` returned."""
        self._start = state

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        settings: dict[str, Any] = self._settings
        streams = [
            SourceBlocks(source, self._encode, seed=f"{self._seed}-{number}", **settings)
            for number, source in enumerate(self._sources)
        ]
        for stream, state in zip(streams, self._start.get("sources", []), strict=False):
            stream.load_state_dict(state)
        given, keys = list(self._start["given"]), summary_keys(self._sources)
        states: deque[dict[str, Any]] = deque(maxlen=_WINDOWS_KEPT)
        self._states = states

        def make(window: int) -> tuple[dict[str, Any], list[NDArray[Any]]]:
            state: dict[str, Any] = {"window": window, "given": list(given)}
            state["sources"] = [stream.state_dict() for stream in streams]
            blocks = [next(streams[i]) for i in self._deal(given)]
            random.Random(f"{self._seed}-window-{window}").shuffle(blocks)
            state["read"] = {key: s.facts() for key, s in zip(keys, streams, strict=True)}
            return state, blocks

        # One window ahead, so that training need not wait: encoding releases Python's lock.
        with ThreadPoolExecutor(1, "corpus") as pool:
            window, skip = self._start["window"], self._start["taken"]
            ahead = pool.submit(make, window)
            while True:
                state, blocks = ahead.result()
                window += 1
                ahead = pool.submit(make, window)
                states.append(state)
                for block in blocks[skip:]:
                    yield {"input_ids": block.tolist()}
                skip = 0

    def _deal(self, given: list[int]) -> list[int]:
        """Return the sources of a window's blocks: always the one that is furthest behind."""
        weights = [source.weight for source in self._sources]
        total, found = sum(weights), []
        for _ in range(self._window):
            count = sum(given) + 1
            behind = [count * w / total - g for w, g in zip(weights, given, strict=True)]
            found.append(behind.index(max(behind)))
            given[found[-1]] += 1
        return found

    def as_dataset(self) -> IterableDataset:
        """Return the stream as an `IterableDataset`, for `Trainer`.

        With several processes, accelerate reads it in the first one and deals out the blocks.
        """
        import datasets

        features = datasets.Features({"input_ids": datasets.List(datasets.Value("int64"))})
        return datasets.IterableDataset.from_generator(_Generator(self), features=features)


class _Generator:
    """A generator function whose stream `datasets` does not try to hash or copy."""

    def __init__(self, stream: BlockStream) -> None:
        self._stream = stream

    def __call__(self) -> Iterator[dict[str, list[int]]]:
        from torch.utils.data import get_worker_info

        if get_worker_info() is not None:  # a checkpoint could not save the worker's position
            raise FastDraftError(
                "dataloader_num_workers: must be 0 with a stream, which reads ahead by itself"
            )
        return iter(self._stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Generator:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())
