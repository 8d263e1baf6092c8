"""Blocks of token ids out of shards: an ordinary map-style dataset that copies nothing.

The ids stay where they are, in memory-mapped files; a block is a stretch of them. So a dataset of
billions of tokens opens at once, `Trainer` shuffles it by its seed, deals it out to processes and
resumes in the middle of it as with any other.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.token_shards import TokenShards

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from numpy.typing import NDArray

# Ranges of a source's ids, counted over all of its parts: [start, end).
Ranges = list[tuple[int, int]]


def pack_blocks(documents: Iterable[Sequence[int]], length: int, count: int) -> Iterator[list[int]]:
    """Concatenate documents and cut the stream into ``count`` blocks of ``length`` ids.

    Every id appears once and in order; what is left at the end is dropped. Fewer blocks come
    when the documents end early.
    """
    buffer: list[int] = []
    made = 0
    for document in documents:
        buffer.extend(document)
        start = 0
        while len(buffer) - start >= length:
            if made == count:
                return
            yield buffer[start : start + length]
            made += 1
            start += length
        del buffer[:start]


def cut_ranges(ranges: Ranges, first: int) -> Ranges:
    """Return ranges without their first ``first`` ids."""
    found = []
    for start, end in ranges:
        gone = min(first, end - start)
        first -= gone
        if start + gone < end:
            found.append((start + gone, end))
    return found


def without_documents(
    lengths: NDArray[np.int64], hashes: NDArray[np.uint64], left_out: NDArray[np.uint64], start: int
) -> Ranges:
    """Return the ranges of a source from ``start`` on, without the documents of some hashes."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    ranges, begin = [], start
    for index in np.flatnonzero(np.isin(hashes, left_out)).tolist():
        from_, to = int(ends[index] - lengths[index]), int(ends[index])
        if to <= begin:
            continue
        if from_ > begin:
            ranges.append((begin, from_))
        begin = max(begin, to)
    if begin < total:
        ranges.append((begin, total))
    return ranges


def block_chunks(parts: Sequence[NDArray[Any]], ranges: Ranges, length: int) -> list[pa.Array]:
    """Return the ids of the ranges, joined and cut into blocks of ``length``.

    A block inside one part is no copy; one that spans two ranges or parts is.
    """

    bounds = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    chunks: list[pa.Array] = []
    rest: list[NDArray[Any]] = []  # the beginning of a block that goes on in the next stretch
    held = 0
    for start, end in ranges:
        for number, part in enumerate(parts):
            low, high = max(start, bounds[number]), min(end, bounds[number + 1])
            if low >= high:
                continue
            here = part[low - bounds[number] : high - bounds[number]]
            if held:
                taken = min(length - held, len(here))
                rest.append(here[:taken])
                held, here = held + taken, here[taken:]
                if held < length:
                    continue
                chunks.append(_blocks(np.concatenate(rest), length))
                rest, held = [], 0
            whole = len(here) // length * length
            if whole:
                chunks.append(_blocks(here[:whole], length))
            if whole < len(here):
                rest, held = [here[whole:]], len(here) - whole
    return chunks


def _blocks(ids: NDArray[Any], length: int) -> pa.Array:
    import pyarrow as pa

    kind = {2: pa.uint16(), 4: pa.uint32()}[ids.dtype.itemsize]
    flat = pa.Array.from_buffers(kind, len(ids), [None, pa.py_buffer(np.ascontiguousarray(ids))])
    return pa.FixedSizeListArray.from_arrays(flat, length)


@dataclass(frozen=True)
class Share:
    """What a source gives to a dataset.

    Attributes:
        ranges: its ids that may be read, in order.
        blocks: how many blocks it gives.
    """

    ranges: Ranges
    blocks: int

    def passes(self, length: int) -> int:
        """Return how often its ids are read; the last time perhaps not to the end."""
        return len(self.cuts(length, 0))

    def cuts(self, length: int, seed: int) -> list[tuple[int, int]]:
        """Return (ids left out at the start, blocks) of every pass.

        A later pass is cut elsewhere, so that no block of it is a block of the first.
        """
        total = sum(end - start for start, end in self.ranges)
        found: list[tuple[int, int]] = []
        due, rng = self.blocks, random.Random(f"{seed}-{total}")
        while due > 0:
            offset = rng.randrange(1, length) if found and total >= 2 * length > 2 else 0
            count = min(due, (total - offset) // length)
            if count < 1:
                raise ValueError(f"{total} ids give no block of {length}")
            found.append((offset, count))
            due -= count
        return found


def blocks_dataset(sources: Sequence[tuple[TokenShards, Share]], length: int, seed: int) -> Dataset:
    """Return ``input_ids`` and ``labels`` of every source's blocks, source by source.

    A source that has fewer is read again, cut elsewhere. The order is left to the sampler.
    """
    import datasets
    import pyarrow as pa

    chunks: list[pa.Array] = []
    for shards, share in sources:
        parts = shards.ids()
        first: list[pa.Array] | None = None
        for offset, count in share.cuts(length, seed):
            if offset or first is None:
                made = block_chunks(parts, cut_ranges(share.ranges, offset), length)
                first = first or made
            else:
                made = first
            for chunk in made:
                if count <= 0:
                    break
                chunks.append(chunk[:count])
                count -= len(chunk)
    ids = pa.chunked_array(chunks)
    table = datasets.table.InMemoryTable(pa.table({"input_ids": ids, "labels": ids}))
    # Given, or it would be made of every id there is.
    made_of = [(str(shards.folder), shards.manifest["parts"], repr(s)) for shards, s in sources]
    fingerprint = hashlib.sha256(json.dumps([made_of, length, seed]).encode()).hexdigest()[:16]
    return datasets.Dataset(table, fingerprint=fingerprint)


def open_shards(folder: Path, length: int) -> Dataset:
    """Return every block of a folder of token shards, once.

    Raises:
        FastDraftError: there are no shards, or too few ids for a block.
    """
    shards = TokenShards.open(folder)
    if shards.tokens < length:
        raise FastDraftError(f"{folder}: its {shards.tokens:,} tokens give no block of {length}")
    whole = Share([(0, shards.tokens)], shards.tokens // length)
    return blocks_dataset([(shards, whole)], length, 0)


def first_blocks(shards: TokenShards, length: int, count: int) -> list[list[int]]:
    """Return a source's first blocks: what is held out of it."""
    chunks = block_chunks(shards.ids(), [(0, count * length)], length)
    return [[int(i) for i in row] for chunk in chunks for row in chunk.to_pylist()][:count]
