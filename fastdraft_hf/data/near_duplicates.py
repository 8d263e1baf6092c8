"""Near duplicates among token sequences: MinHash finds candidates, exact similarity decides.

The similarity of two texts is the Jaccard index of their sets of runs of ``RUN`` token ids. With
MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets,
chapter 3), two sets agree in one of ``HASHES`` minima with probability s, their similarity, and
become candidates when all r minima of one of ``HASHES / r`` bands agree. A pair is missed with
probability (1 - s^r)^(HASHES / r). r is the largest power of two that keeps this at or below
``MISSED`` at the threshold. Every candidate is compared exactly, so there are no false positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN = 5
HASHES = 128
MISSED = 1e-3


class NearDuplicates:
    """Remembers texts and finds, for a new one, an earlier text that is nearly the same.

    Args:
        threshold: similarity from which two texts are near duplicates, above 0 and at most 1.
        seed: of the hash functions.
    """

    def __init__(self, threshold: float, seed: int = 0) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: above 0 and at most 1, got {threshold}")
        self._threshold = threshold
        # The largest r = 2^i that misses a pair at the threshold rarely enough.
        rows = 1
        while rows < HASHES and (1 - threshold ** (2 * rows)) ** (HASHES // (2 * rows)) <= MISSED:
            rows *= 2
        self._rows_per_band = rows
        random = np.random.default_rng(seed)
        # Odd factors: multiplying by them loses nothing modulo 2^64.
        self._factors = random.integers(0, 2**63, HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
        self._terms = random.integers(0, 2**64, HASHES, np.uint64)
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        self._runs: list[NDArray[np.uint64]] = []

    def find_or_add(self, ids: Sequence[int]) -> int | None:
        """Return the number of an earlier text that this one is near to, or remember it.

        Args:
            ids: token ids of one text. An empty one is near to no other.

        Returns:
            how many texts had been remembered before the one found, or ``None``.
        """
        runs = _hashed_runs(ids)
        if not len(runs):
            return None
        minima = (runs[:, None] * self._factors + self._terms).min(0)
        bands = minima.reshape(-1, self._rows_per_band)
        keys = [(number, band.tobytes()) for number, band in enumerate(bands)]
        for number in dict.fromkeys(n for key in keys for n in self._bands.get(key, ())):
            other = self._runs[number]
            both = len(np.intersect1d(runs, other, assume_unique=True))
            if both / (len(runs) + len(other) - both) >= self._threshold:
                return number
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._runs))
        self._runs.append(runs)
        return None


def _hashed_runs(ids: Sequence[int]) -> NDArray[Any]:
    """Return the sorted 64-bit hashes of the runs of ``RUN`` ids; a shorter text is one run."""
    values = np.asarray(ids, np.uint64)
    if not len(values):
        return values
    length = min(RUN, len(values))
    hashes = np.full(len(values) - length + 1, length, np.uint64)
    for offset in range(length):
        # The finalizer of splitmix64 (Steele et al. 2014), a bijection of 64 bits.
        hashes ^= values[offset : len(values) - length + 1 + offset]
        hashes += np.uint64(0x9E3779B97F4A7C15)
        hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashes ^= hashes >> np.uint64(31)
    return np.unique(hashes)
