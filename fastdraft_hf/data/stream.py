"""A mixture that is read while training: nothing is written, and every place can be returned to.

Blocks come in windows. A window has of every source the blocks its weight asks for, counted over
all windows so far: shares are exact to a block, whatever the documents' lengths. Inside a window
they are shuffled by the seed. The place of a stream is where its sources stood when a window began
and how many of its blocks were taken; going on from there gives what would have come.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.documents import DocumentReader, settled
from fastdraft_hf.data.encoding import DocumentEncoder, batches
from fastdraft_hf.data.sources import Source, summary_keys, token_shares

if TYPE_CHECKING:
    from datasets import IterableDataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

WINDOW = 256
# Text that is tokenised at once: what going on from a place may repeat.
_BATCH_CHARS = 1 << 16
# One document at a time where they are held out: every one that is read is lost to training.
_SAMPLE_CHARS = 1
_WINDOWS_KEPT = 64
HELD_OUT = "held out for evaluation"


class _SourceStream:
    """One source, endless: packed blocks, pass after pass, each in another order."""

    def __init__(
        self,
        source: Source,
        encode: DocumentEncoder,
        *,
        length: int,
        seed: str,
        generated: Path | None,
        left_out: frozenset[int],
        rank: int,
        world: int,
        batch_chars: int = _BATCH_CHARS,
    ) -> None:
        self._source, self._encode, self._length, self._seed = source, encode, length, seed
        self._batch_chars = batch_chars
        self._generated, self._left_out = generated, left_out
        self._rank, self._world = rank, world
        self._passes = 1
        self._place: dict[str, Any] = {}
        self._carry: NDArray[Any] = np.empty(0, encode.dtype)
        self._skip = 0  # blocks of the batch after `_place` that were given
        self._iterator: Iterator[NDArray[Any]] | None = None
        self.counts: dict[str, Any] = {
            "tokens": 0,
            "bytes": 0,
            "documents": 0,
            "tokens_read": 0,
            "dropped": {},
        }
        # Hashes of the documents that were read, where they are held out.
        self.hashes: list[int] | None = None

    @property
    def passes(self) -> int:
        """The pass it is in, counted from 1."""
        return self._passes

    def state(self) -> dict[str, Any]:
        return {
            "pass": self._passes,
            "place": self._place,
            "carry": self._carry.tolist(),
            "skip": self._skip,
            "counts": {**self.counts, "dropped": dict(self.counts["dropped"])},
        }

    def seek(self, state: dict[str, Any]) -> None:
        self._passes, self._place = int(state["pass"]), dict(state["place"])
        self._carry = np.array(state["carry"], self._encode.dtype)
        self._skip = int(state["skip"])
        self.counts = {**state["counts"], "dropped": dict(state["counts"]["dropped"])}
        self._iterator = None

    def __next__(self) -> NDArray[Any]:
        if self._iterator is None:
            self._iterator = self._blocks()
        block = next(self._iterator)
        self.counts["tokens"] += self._length
        return block

    def _blocks(self) -> Iterator[NDArray[Any]]:
        skip, resumed = self._skip, self._skip > 0
        while True:
            reader = DocumentReader(
                self._source,
                self._generated,
                f"{self._seed}-{self._passes}",
                self._rank,
                self._world,
            )
            reader.seek(self._place)
            gave = bool(self._place)
            for batch in batches(reader, self._batch_chars):
                ids = self._read(batch, counted=not resumed)
                if self._passes == 1 and not self._place and not resumed:
                    self._drop(reader.dropped)  # rows that were filtered before
                resumed = False
                gave = gave or len(ids) > 0
                joined = np.concatenate([self._carry, ids])
                whole = len(joined) // self._length
                blocks = joined[: whole * self._length].reshape(whole, self._length)
                for number in range(skip, whole):
                    self._skip = number + 1
                    yield blocks[number]
                skip = 0
                self._carry = joined[whole * self._length :].copy()
                self._place, self._skip = settled(reader.place), 0
            if not gave:
                dropped = ", ".join(f"{k}: {n}" for k, n in self.counts["dropped"].items())
                raise FastDraftError(
                    f"source {self._source.kind} '{self._source.name}': it gave no text to train "
                    f"on ({dropped or 'no document'})"
                )
            self._passes, self._place = self._passes + 1, {}

    def _read(self, batch: list[Any], *, counted: bool) -> NDArray[Any]:
        encoded = self._encode(batch)
        if self._left_out:
            keep = np.array([h not in self._left_out for h in encoded.hashes.tolist()], bool)
            encoded = encoded.select(keep, HELD_OUT)
        if self.hashes is not None:
            self.hashes += encoded.hashes.tolist()
        if counted:  # a batch that is read once more to go on inside it was counted before
            self.counts["documents"] += len(encoded.lengths)
            self.counts["bytes"] += int(encoded.sizes.sum())
            self.counts["tokens_read"] += len(encoded.ids)
            self._drop(encoded.dropped)
        return encoded.ids

    def _drop(self, counts: dict[str, int]) -> None:
        dropped = self.counts["dropped"]
        for reason, count in counts.items():
            dropped[reason] = dropped.get(reason, 0) + count


class BlockStream:
    """Endless packed blocks of a mixture.

    Iterating yields ``{"input_ids": …, "labels": …}`` of ``length`` ids each.

    Args:
        sources: what is read, with its weights.
        tokenizer: the target's.
        overlaps: whether a text overlaps held-out text.
        length: ids a block.
        seed: of every order.
        generated: folder of the generated sets.
        left_out: hashes of documents that are held out.
        rank, world: of several processes, this one gets its part of the documents: no document is
            in two parts, and together they are all. One process per node and device reads its own.
        window: blocks that are shuffled together.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        overlaps: Callable[[str], bool],
        length: int,
        seed: int,
        generated: Path | None = None,
        left_out: frozenset[int] = frozenset(),
        rank: int = 0,
        world: int = 1,
        window: int = WINDOW,
    ) -> None:
        self._sources, self._seed, self._window = list(sources), seed, window
        self._weights = [source.weight for source in sources]
        self._settings: dict[str, Any] = {
            "length": length,
            "generated": generated,
            "left_out": left_out,
            "rank": rank,
            "world": world,
        }
        self._encode = DocumentEncoder(tokenizer, overlaps)
        self._start: dict[str, Any] | None = None
        # Of the iteration that began last: (number of the first block, state when the window
        # began), of the last few windows.
        self._began: deque[tuple[int, dict[str, Any]]] = deque()

    def _open(self, **changes: Any) -> list[_SourceStream]:
        """Open every source anew: iterations that overlap share nothing."""
        return [
            _SourceStream(
                source,
                self._encode,
                seed=f"{self._seed}-{number}",
                **{**self._settings, **changes},
            )
            for number, source in enumerate(self._sources)
        ]

    def seek(self, place: dict[str, Any]) -> None:
        """Let iterations begin at a place that `place` returned."""
        self._start = place

    def place(self, taken: int) -> dict[str, Any]:
        """Return the place after ``taken`` blocks of the iteration that began last.

        It is plain data; ``read`` in it says what had been read of every source at the end of the
        window it lies in. Blocks that were made ahead and are not among these will come again.

        Raises:
            ValueError: that place is too long ago.
        """
        for first, state in reversed(self._began):
            if first <= taken:
                return {**state, "taken": taken - first}
        raise ValueError(f"block {taken}: a place so long ago is not kept")

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        streams = self._open()
        window, skip, given = 0, 0, [0] * len(streams)
        if self._start is not None:
            for stream, state in zip(streams, self._start["sources"], strict=True):
                stream.seek(state)
            window, skip = int(self._start["window"]), int(self._start["taken"])
            given = list(self._start["given"])
        began: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_WINDOWS_KEPT)
        self._began = began

        keys = summary_keys(self._sources)

        def make(window: int) -> tuple[dict[str, Any], list[NDArray[Any]]]:
            state = {
                "window": window,
                "given": list(given),
                "sources": [stream.state() for stream in streams],
            }
            blocks = [next(streams[i]) for i in self._deal(given)]
            random.Random(f"{self._seed}-window-{window}").shuffle(blocks)
            # What a summary says: until the window's end, of which some may not be trained on.
            facts = [source_facts(stream.state()) for stream in streams]
            state["read"] = dict(zip(keys, facts, strict=True))
            return state, blocks

        number = 0
        # One window ahead, so that training need not wait; tokenising lets go of Python's lock.
        with ThreadPoolExecutor(1, "corpus") as pool:
            ahead = pool.submit(make, window)
            while True:
                state, blocks = ahead.result()
                window += 1
                ahead = pool.submit(make, window)
                began.append((number - skip, state))
                for block in blocks[skip:]:
                    number += 1
                    ids = block.tolist()
                    yield {"input_ids": ids, "labels": ids}
                skip = 0

    def _deal(self, given: list[int]) -> list[int]:
        """Return the sources of a window's blocks: always the one that is furthest behind."""
        total, found = sum(self._weights), []
        for _ in range(self._window):
            count = sum(given) + 1
            behind = [count * w / total - g for w, g in zip(self._weights, given, strict=True)]
            chosen = behind.index(max(behind))
            given[chosen] += 1
            found.append(chosen)
        return found

    def held_out(self, count: int) -> tuple[list[list[int]], frozenset[int], dict[str, Any]]:
        """Return blocks of the mixture's beginning, to be held out, and what they were made of.

        A source that ends before it has given its share holds nothing out.

        Returns:
            at most ``count`` blocks; the hashes of every document that was read for them, to be
            left out of the stream that is trained on; and what a sample of every source is like.
        """
        found: list[list[int]] = []
        hashes: set[int] = set()
        facts = {}
        shares = token_shares(self._weights, count)
        streams = self._open(batch_chars=_SAMPLE_CHARS)
        for key, stream, share in zip(summary_keys(self._sources), streams, shares, strict=True):
            stream.hashes = []
            # At least one, for the sample.
            blocks = [next(stream).tolist() for _ in range(max(1, share))]
            facts[key] = source_facts(stream.state())
            if stream.passes == 1 and share:
                found += blocks
                hashes |= set(stream.hashes)
        return found, frozenset(hashes), facts


def source_facts(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a summary says of a source that was read up to a state."""
    counts = state["counts"]
    return {
        "tokens": counts["tokens"],
        "passes": state["pass"],
        "bytes": counts["bytes"],
        "bytes_per_token": round(counts["bytes"] / max(1, counts["tokens_read"]), 3),
        "documents": counts["documents"],
        "dropped": dict(counts["dropped"]),
    }


def as_dataset(stream: BlockStream) -> IterableDataset:
    """Return the stream as `datasets` and `Trainer` know one.

    `Trainer` counts steps and not blocks of a pass, so the stream needs no length. With several
    processes, `accelerate` reads it in the first one and deals the blocks out.
    """
    import datasets

    features = datasets.Features(
        {name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "labels")}
    )
    found: IterableDataset = datasets.IterableDataset.from_generator(
        _Blocks(stream), features=features
    )
    return found


class _Blocks:
    """A generator function that `datasets` does not try to take a fingerprint of its stream by."""

    def __init__(self, stream: BlockStream) -> None:
        self._stream = stream

    def __call__(self) -> Iterator[dict[str, list[int]]]:
        return iter(self._stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Blocks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Only ever taken a fingerprint of: a stream is not sent to other processes.
        return (object, ())
