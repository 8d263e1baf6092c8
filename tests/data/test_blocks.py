"""Blocks out of shards: every id in order, nothing copied, later passes cut elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.data.blocks import (
    Share,
    block_chunks,
    cut_ranges,
    pack_blocks,
    without_documents,
)


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12),
    st.integers(1, 9),
    st.integers(0, 12),
)
def test_packing_keeps_every_id_once_and_in_order(
    texts: list[list[int]], length: int, count: int
) -> None:
    stream = [i for text in texts for i in text]
    blocks = list(pack_blocks(texts, length, count))
    assert all(len(block) == length for block in blocks)
    assert len(blocks) == min(count, len(stream) // length)
    assert [i for block in blocks for i in block] == stream[: len(blocks) * length]


@given(
    sizes=st.lists(st.integers(0, 25), max_size=6),
    cuts=st.lists(st.integers(0, 150), max_size=6).map(sorted),
    length=st.integers(1, 12),
    wide=st.booleans(),
)
def test_blocks_are_the_ranges_in_order(
    sizes: list[int], cuts: list[int], length: int, wide: bool
) -> None:
    ids = np.arange(sum(sizes), dtype=np.uint32 if wide else np.uint16)
    parts = np.split(ids, np.cumsum(sizes)[:-1]) if sizes else []
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    wanted = [int(i) for start, end in ranges for i in ids[start:end]]
    chunks = block_chunks(parts, ranges, length)
    blocks = [block for chunk in chunks for block in chunk.to_pylist()]
    assert blocks == [
        wanted[i : i + length] for i in range(0, len(wanted) // length * length, length)
    ]


def test_blocks_inside_a_part_are_no_copies() -> None:
    part = np.arange(1000, dtype=np.uint16)
    (chunk,) = block_chunks([part], [(3, 990)], 10)
    assert chunk.flatten().to_numpy(zero_copy_only=True).ctypes.data == part[3:].ctypes.data


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=6), st.integers(0, 60))
def test_cutting_off_the_start(pairs: list[tuple[int, int]], first: int) -> None:
    ranges, at = [], 0
    for gap, size in pairs:
        ranges.append((at + gap, at + gap + size))
        at += gap + size
    every = [i for start, end in ranges for i in range(start, end)]
    assert [i for a, b in cut_ranges(ranges, first) for i in range(a, b)] == every[first:]


@given(
    documents=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), max_size=12),
    left_out=st.sets(st.integers(0, 5)),
    start=st.integers(0, 20),
)
def test_documents_are_left_out_whole(
    documents: list[tuple[int, int]], left_out: set[int], start: int
) -> None:
    lengths = np.array([size for size, _ in documents], np.int64)
    hashes = np.array([name for _, name in documents], np.uint64)
    ranges = without_documents(lengths, hashes, np.array(sorted(left_out), np.uint64), start)
    owner = [name for size, name in documents for _ in range(size)]
    kept = [i for i, name in enumerate(owner) if i >= start and name not in left_out]
    assert [i for a, b in ranges for i in range(a, b)] == kept


@given(total=st.integers(1, 200), blocks=st.integers(1, 60), length=st.integers(1, 40))
def test_every_pass_has_what_it_can(total: int, blocks: int, length: int) -> None:
    share = Share([(0, total)], blocks)
    if total < length:
        with pytest.raises(ValueError, match="give no block"):
            share.cuts(length, 0)
        return
    cuts = share.cuts(length, 0)
    assert sum(count for _, count in cuts) == blocks
    assert cuts[0][0] == 0
    for offset, count in cuts[:-1]:
        assert count == (total - offset) // length
    if total >= 2 * length > 2:
        assert all(0 < offset < length for offset, _ in cuts[1:])
    assert share.cuts(length, 0) == cuts


def test_a_later_pass_depends_on_the_seed() -> None:
    share = Share([(0, 1000)], 50)
    found: set[Any] = {tuple(share.cuts(100, seed)) for seed in range(8)}
    assert len(found) > 4
