"""Near duplicates of texts: MinHash finds candidates, exact similarity decides.

The similarity of two texts is the Jaccard index of their sets of runs of ``RUN`` token ids.
MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets,
chapter 3): two sets of similarity s agree in each of ``HASHES`` minima with probability s, and are
candidates if all ``r`` minima of one of ``HASHES / r`` bands agree. A pair is missed with
probability (1 - s^r)^(HASHES / r); r is the largest power of two that keeps this at or below
``MISSED`` at the threshold. Every candidate is then compared exactly.

It needs numpy only. datasketch requires scipy, rensa takes texts instead of ids, and both leave
the exact comparison to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RUN = 5
HASHES = 128
MISSED = 1e-3


class NearDuplicates:
    """Finds, for a new text, an earlier text that is nearly the same.

    Args:
        threshold: similarity of near duplicates, above 0 and at most 1.
        seed: of the hash functions.
    """

    def __init__(self, threshold: float, seed: int = 0) -> None:
        import numpy as np  # lazy: recipes are read without it

        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: must be above 0 and at most 1, got {threshold}")
        self.threshold = threshold
        self.rows_per_band = rows_per_band(threshold)
        random = np.random.default_rng(seed)
        # Odd factors: multiplication by them is one to one modulo 2^64.
        self._factors = random.integers(0, 2**63, HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
        self._terms = random.integers(0, 2**64, HASHES, np.uint64)
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        self._runs: list[np.ndarray[Any, Any]] = []

    def __len__(self) -> int:
        return len(self._runs)

    def find_or_add(self, ids: Sequence[int]) -> int | None:
        """Return the number of an earlier text that this one is near to, or store it.

        Args:
            ids: token ids of one text. An empty one is near to no other.

        Returns:
            the number of texts stored before the one found, or ``None``.
        """
        runs = hashed_runs(ids)
        if not len(runs):
            return None
        keys = self._keys(runs)
        candidates = dict.fromkeys(n for key in keys for n in self._bands.get(key, ()))
        for number in candidates:
            if _jaccard(runs, self._runs[number]) >= self.threshold:
                return number
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._runs))
        self._runs.append(runs)
        return None

    def _keys(self, runs: np.ndarray[Any, Any]) -> list[tuple[int, bytes]]:
        minima = (runs[:, None] * self._factors + self._terms).min(0)
        bands = minima.reshape(-1, self.rows_per_band)
        return [(number, band.tobytes()) for number, band in enumerate(bands)]


def rows_per_band(threshold: float) -> int:
    """Return the largest r = 2^i that misses a pair at the threshold rarely enough."""
    rows = 1
    while rows < HASHES and missed(threshold, 2 * rows) <= MISSED:
        rows *= 2
    return rows


def missed(similarity: float, rows: int) -> float:
    """Return the chance that a pair of this similarity shares no band of ``rows`` minima."""
    return float((1 - similarity**rows) ** (HASHES // rows))


def hashed_runs(ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return the sorted 64-bit hashes of the set of runs of ``RUN`` ids; a shorter text is one."""
    import numpy as np

    values = np.asarray(ids, np.uint64)
    if not len(values):
        return np.zeros(0, np.uint64)
    length = min(RUN, len(values))
    hashes = np.full(len(values) - length + 1, length, np.uint64)
    for start in range(length):
        hashes = _mixed(hashes ^ values[start : len(values) - length + 1 + start])
    return np.unique(hashes)


def _mixed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scramble 64-bit numbers one to one (the finalizer of splitmix64, Steele et al. 2014)."""
    import numpy as np

    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray[Any, Any] = values ^ (values >> np.uint64(31))
    return mixed


def _jaccard(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    import numpy as np

    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)
