"""Which generated rows training leaves out, with a counted reason for each, and which of the
target's own instructions (Magpie) are worth answering.

All rows stay on disk. `write_filters` lists the dropped rows in a set's folder when the set is
complete, so `iter_kept_rows` gives every later stage the same rows without the recipe.

Near duplicates: MinHash finds candidates, exact similarity decides. The similarity of two texts is
the Jaccard index of their sets of runs of ``RUN`` token ids. With MinHash and locality-sensitive
hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3), two sets agree in one
of ``HASHES`` minima with probability s, their similarity, and become candidates when all r minima
of one of ``HASHES / r`` bands agree. A pair is missed with probability (1 - s^r)^(HASHES / r). r is
the largest power of two that keeps this at or below ``MISSED`` at the threshold.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdraft_hf._atomic import read_json, write_json
from fastdraft_hf._card import PROVENANCE
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.parts import has_parts, iter_rows, stored_indices
from fastdraft_hf.data.prompts import shared_ends, written_instruction

FILTERS = "filters.json"
KEPT = "kept"

# A completion is a loop if it ends with three repeats of at most 80 tokens, 60 tokens in all.
LOOP_TAIL, LOOP_PERIOD, LOOP_TIMES = 60, 80, 3
# A completion of at least 100 tokens is repetitive if more than half of its runs of six tokens
# occur earlier in it, as in a list that counts on and says the same thing again.
REPETITIVE_LENGTH, REPETITIVE_RUN, REPETITIVE_SHARE = 100, 6, 0.5
# Prompts that decide what all prompts of a set share. A fixed number, so that a verdict does not
# change when the set grows.
_SHARED_BY = 256
# Tokens of the shortest instruction.
SHORTEST = 5
# Of near duplicates.
RUN, HASHES, MISSED = 5, 128, 1e-3


class NearDuplicates:
    """Remembers texts and finds, for a new one, an earlier text that is nearly the same.

    Args:
        threshold: similarity from which two texts are near duplicates, above 0 and at most 1. With
            ``None`` there are none.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        # The largest r = 2^i that misses a pair at the threshold rarely enough.
        rows, s = 1, threshold or 1.0
        while rows < HASHES and (1 - s ** (2 * rows)) ** (HASHES // (2 * rows)) <= MISSED:
            rows *= 2
        self._rows_per_band = rows
        random = np.random.default_rng(0)
        # Odd factors: multiplying by them loses nothing modulo 2^64.
        self._factors = random.integers(0, 2**63, HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
        self._terms = random.integers(0, 2**64, HASHES, np.uint64)
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        self._runs: list[NDArray[np.uint64]] = []

    def find_or_add(self, ids: Sequence[int]) -> int | None:
        """Return the number of an earlier text that this one is near to, or remember it.

        The number is how many texts had been remembered before. An empty text is near to no other.
        """
        if self._threshold is None or not len(ids):
            return None
        runs = _hashed_runs(ids)
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
    """Return the hashes of the runs of ``RUN`` ids, each once; a shorter text is one run."""
    runs = zip(*(ids[start:] for start in range(min(RUN, len(ids)))), strict=False)
    # Python hashes numbers, and tuples of them, the same everywhere.
    return np.unique(np.array([hash(run) for run in runs], np.int64)).view(np.uint64)


def in_a_loop(ids: Sequence[int], tail: int = LOOP_TAIL, longest_period: int = LOOP_PERIOD) -> bool:
    """Return whether the ids end with ``LOOP_TIMES`` repeats, of ``tail`` ids in all at least."""
    for period in range(1, min(longest_period, len(ids) // LOOP_TIMES) + 1):
        if ids[-1] == ids[-1 - period]:  # cheap, and rules out most
            end = ids[-max(tail, LOOP_TIMES * period) :]
            if len(end) >= tail and end[period:] == end[:-period]:
                return True
    return False


def repeats_itself(ids: Sequence[int]) -> bool:
    """Return whether more than half of the runs of ``REPETITIVE_RUN`` ids occur earlier."""
    if len(ids) < REPETITIVE_LENGTH:
        return False
    runs = list(zip(*(ids[start:] for start in range(REPETITIVE_RUN)), strict=False))
    return len(set(runs)) < (1 - REPETITIVE_SHARE) * len(runs)


def judge_rows(
    rows: Iterable[dict[str, Any]], near_duplicates: float | None = None
) -> Iterator[tuple[int, str]]:
    """Yield every row's index with ``kept`` or the reason why it is dropped.

    Reasons, in the order of the checks: ``empty`` (nothing but a stop token), ``loop``
    (`in_a_loop`), ``repetition`` (`repeats_itself`), ``duplicate`` (the same prompt and
    completion), ``near duplicate`` (what all prompts of the set begin or end with is left out of
    the similarity).

    Args:
        rows: of a set, by increasing index.
        near_duplicates: the threshold of `NearDuplicates`.
    """
    near = NearDuplicates(near_duplicates)
    rows = iter(rows)
    ahead = list(itertools.islice(rows, _SHARED_BY))
    first, last = shared_ends([row["prompt_ids"] for row in ahead])
    seen: set[tuple[Any, ...]] = set()

    def judge(row: dict[str, Any]) -> str:
        ids = list(row["completion_ids"])
        identity = (row["prompt_hash"], tuple(ids))
        stopped = row["finish_reason"] == "stop"
        if len(ids) - stopped < 1:
            return "empty"
        text = ids[:-1] if stopped else ids
        if in_a_loop(text):
            return "loop"
        if repeats_itself(text):
            return "repetition"
        if identity in seen:
            return "duplicate"
        own = list(row["prompt_ids"])
        if near.find_or_add(own[first : len(own) - last] + ids) is not None:
            return "near duplicate"
        seen.add(identity)
        return KEPT

    for row in itertools.chain(ahead, rows):
        yield row["index"], judge(row)


def write_filters(folder: Path, near_duplicates: float | None) -> Counter[str]:
    """Judge a complete set's rows, list the dropped ones in its folder, and return the counts."""
    counts: Counter[str] = Counter()
    dropped: dict[str, list[int]] = {}
    for index, reason in judge_rows(iter_rows(folder), near_duplicates):
        counts[reason] += 1
        if reason != KEPT:
            dropped.setdefault(reason, []).append(index)
    record = {"rows": counts.total(), "counts": dict(counts), "dropped": dropped}
    write_json(folder / FILTERS, record)
    return counts


def kept_indices(folder: Path) -> tuple[np.ndarray, Counter[str]]:
    """Return the sorted indices of a set's kept rows, and how many rows have which reason.

    Raises:
        FastDraftError: it is not a complete set, or a part is damaged or missing.
    """
    if not has_parts(folder):
        raise FastDraftError(f"{folder}: not a generated set (it has no part-*.parquet)")
    path = folder / FILTERS
    if not path.exists() and (folder.parent / PROVENANCE).exists():
        raise FastDraftError(f"{path} is missing. Run stage generate again to make it")
    if not path.exists():  # a set that was written in Python and not judged
        judged = list(judge_rows(iter_rows(folder)))
        kept = np.array([index for index, reason in judged if reason == KEPT], np.int64)
        return kept, Counter(reason for _, reason in judged)
    found = read_json(path)
    indices = stored_indices(folder)
    dropped = [index for some in found["dropped"].values() for index in some]
    kept = np.setdiff1d(indices, np.array(dropped, np.int64))
    counts = Counter(found["counts"])
    if found["rows"] != len(indices) or counts[KEPT] != len(kept):
        raise FastDraftError(
            f"{folder}: it has {len(indices):,} of {found['rows']:,} rows. Run stage generate "
            "again to generate the missing ones"
        )
    return kept, +counts


def iter_kept_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the kept rows of a complete set, by increasing index; raises as `kept_indices`."""
    return iter_rows(folder, columns, only=kept_indices(folder)[0])


def keep_instructions(
    rows: Iterable[dict[str, Any]],
    decode: Callable[[Sequence[int]], str],
    overlaps: Callable[[str], bool],
    *,
    suffix: Sequence[int] = (),
    special_ids: Set[int] = frozenset(),
    near_duplicates: float | None,
) -> tuple[list[tuple[int, ...]], Counter[str]]:
    """Return the instructions worth answering, as ids without the end of the turn, and counts.

    Reasons, in the order of the checks: ``cut off`` (the turn did not end), ``special token`` (a
    turn within a turn), ``too short`` (fewer than ``SHORTEST`` tokens), ``loop``, ``duplicate``,
    ``overlaps held-out text`` and ``near duplicate``.

    Args:
        rows: completions of the template's start, by increasing index.
        decode: ids to text.
        overlaps: whether a text overlaps held-out text (`Decontaminator.overlaps`).
        suffix: the template's ids after the user's message (`prompts.template_ends`).
        special_ids: the tokenizer's special tokens.
        near_duplicates: the threshold of `NearDuplicates`.
    """
    near = NearDuplicates(near_duplicates)
    seen: set[tuple[int, ...]] = set()

    def judge(ids: tuple[int, ...] | None) -> str:
        if ids is None:
            return "cut off"
        if any(token in special_ids for token in ids):
            return "special token"
        if len(ids) < SHORTEST:
            return "too short"
        if in_a_loop(ids, tail=30, longest_period=10):
            return "loop"
        if ids in seen:
            return "duplicate"
        if overlaps(decode(ids)):
            return "overlaps held-out text"
        if near.find_or_add(ids) is not None:
            return "near duplicate"
        seen.add(ids)
        return KEPT

    kept, reasons = [], Counter[str]()
    for row in rows:
        ids = written_instruction(row["completion_ids"], row["finish_reason"], suffix, special_ids)
        reason = judge(ids)
        reasons[reason] += 1
        if reason == KEPT and ids is not None:
            kept.append(ids)
    return kept, reasons
