"""Which generated rows training leaves out, with a counted reason for each, and which of the
target's own instructions (Magpie) are worth answering.

All rows stay on disk. `write_filters` lists the dropped rows in a set's folder when the set is
complete, so `read_kept_rows` gives every later stage the same rows without the recipe, the
tokenizer or the language classifier.

Languages are identified by py3langid (an optional extra), the maintained fork of langid.py (Lui and
Baldwin 2012): a naive Bayes classifier over byte n-grams, without network access. It is unsure of
short and mixed texts, so only a text that is surely in another language is dropped.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fastdraft_hf._atomic import write_json
from fastdraft_hf._config import Number, Section
from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.data.generations import check_set
from fastdraft_hf.data.near_duplicates import NearDuplicates
from fastdraft_hf.data.parts import iter_rows, stored_indices
from fastdraft_hf.data.prompts import shared_ends, written_instruction

FILTERS = "filters.json"
KEPT = "kept"

# A completion is a loop if its last 60 tokens repeat with a period of at most 20, or if it ends
# with three repeats of at most 80 tokens.
LOOP_TAIL, LOOP_PERIOD = 60, 20
LONG_LOOP_PERIOD, LONG_LOOP_TIMES = 80, 3
# A completion of at least 100 tokens is repetitive if more than half of its runs of six tokens
# occur earlier in it, as in a list that counts on and says the same thing again.
REPETITIVE_LENGTH, REPETITIVE_RUN, REPETITIVE_SHARE = 100, 6, 0.5
# Prompts that decide what all prompts of a set share. A fixed number, so that a verdict does not
# change when the set grows.
_SHARED_BY = 256

# The language of a text with fewer letters, code left out, is not judged.
LETTERS = 20
# How sure the classifier must be of another language.
CONFIDENCE = 0.8

# Tokens of the shortest instruction.
SHORTEST = 5

_CODE = re.compile(r"[a-z]{2,3}")
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)

Decode = Callable[[Sequence[int]], str]


class RowFilters(Section):
    """Which rows training leaves out, besides empty ones, loops and duplicates."""

    cut_off: Literal["keep", "drop"] = Field(
        "keep", description="completions that reached max_new_tokens"
    )
    near_duplicates: Number | None = Field(
        0.8,
        description=(
            "similarity from which a later row is a near duplicate (Jaccard index of runs of five "
            "tokens, prompt and completion together); empty: near duplicates are kept"
        ),
    )
    language: str | None = Field(
        None,
        description=(
            "ISO 639-1 code; completions that are surely in another language are dropped (needs "
            "the extra fastdraft_hf[language])"
        ),
    )

    def check_values(self) -> None:
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise FastDraftError(
                f"near_duplicates: must be above 0 and at most 1, or empty; got "
                f"{self.near_duplicates}"
            )
        # The stage checks that the classifier knows the code (`check_language`): recipes are also
        # read on machines without the classifier.
        if self.language is not None and not _CODE.fullmatch(self.language):
            raise FastDraftError(
                f"language: '{self.language}' is not a language code; use one of ISO 639-1 (en, "
                "de, zh)"
            )


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_language(code: str) -> None:
    """Raise `FastDraftError` if the extra is not installed or does not know the code."""
    if importlib.util.find_spec("py3langid") is None:
        raise FastDraftError(
            "language: py3langid is not installed; `pip install fastdraft_hf[language]`"
        )
    labels = _identifier().labels
    if code not in labels:
        raise FastDraftError(
            f"language: py3langid does not know '{code}'{nearest(code, labels)}. Most codes have "
            "two letters (ISO 639-1: en, de, zh)"
        )


def in_another_language(text: str, code: str) -> bool:
    """Return whether a text, without its fenced code, is surely not in the language ``code``."""
    prose = _FENCED.sub(" ", text)
    if sum(map(str.isalpha, prose)) < LETTERS:
        return False
    found, confidence = _identifier().classify(prose)
    return bool(found != code and confidence >= CONFIDENCE)


def in_a_loop(ids: Sequence[int], tail: int = LOOP_TAIL, longest_period: int = LOOP_PERIOD) -> bool:
    """Return whether the last ``tail`` ids repeat with a period of ``longest_period`` or less."""
    if len(ids) < tail:
        return False
    end = ids[-tail:]
    return any(end[period:] == end[:-period] for period in range(1, longest_period + 1))


def in_a_long_loop(ids: Sequence[int]) -> bool:
    """Return whether the ids end with ``LONG_LOOP_TIMES`` repeats of up to 80 ids."""
    return any(
        in_a_loop(ids[-LONG_LOOP_TIMES * period :], LONG_LOOP_TIMES * period, period)
        for period in range(LOOP_PERIOD + 1, LONG_LOOP_PERIOD + 1)
        # A cheap test first: it rules out most.
        if len(ids) >= LONG_LOOP_TIMES * period and ids[-1] == ids[-1 - period]
    )


def repeats_itself(ids: Sequence[int]) -> bool:
    """Return whether more than half of the runs of ``REPETITIVE_RUN`` ids occur earlier."""
    if len(ids) < REPETITIVE_LENGTH:
        return False
    runs = list(zip(*(ids[start:] for start in range(REPETITIVE_RUN)), strict=False))
    return len(set(runs)) < (1 - REPETITIVE_SHARE) * len(runs)


def judge_rows(
    rows: Iterable[dict[str, Any]],
    filters: RowFilters | None = None,
    decode: Decode | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield every row's index with ``kept`` or the reason why it is dropped.

    Reasons, in the order of the checks: ``empty`` (nothing but a stop token), ``cut off`` (if
    asked for), ``loop`` (`in_a_loop`, `in_a_long_loop`), ``repetition`` (`repeats_itself`),
    ``duplicate`` (the same prompt and completion), ``wrong language`` (if asked for), ``near
    duplicate`` (`near_duplicates`; what all prompts of the set begin or end with is left out of the
    similarity).

    Args:
        rows: of a set, by increasing index.
        filters: what to check besides empty rows, loops and duplicates.
        decode: ids to text, needed for ``filters.language``.
    """
    wanted = filters or RowFilters(near_duplicates=None)
    if wanted.language is not None and decode is None:
        raise ValueError("a language needs decode")
    near = None if wanted.near_duplicates is None else NearDuplicates(wanted.near_duplicates)
    rows = iter(rows)
    ahead = list(itertools.islice(rows, _SHARED_BY if near is not None else 0))
    first, last = shared_ends([row["prompt_ids"] for row in ahead])
    seen: set[tuple[Any, ...]] = set()

    def judge(row: dict[str, Any]) -> str:
        ids = list(row["completion_ids"])
        identity = (row["prompt_hash"], tuple(ids))
        stopped = row["finish_reason"] == "stop"
        if len(ids) - stopped < 1:
            return "empty"
        if not stopped and wanted.cut_off == "drop":
            return "cut off"
        text = ids[:-1] if stopped else ids
        if in_a_loop(text) or in_a_long_loop(text):
            return "loop"
        if repeats_itself(text):
            return "repetition"
        if identity in seen:
            return "duplicate"
        language = wanted.language
        if language and decode is not None and in_another_language(decode(text), language):
            return "wrong language"
        if near is not None:
            own = list(row["prompt_ids"])
            if near.find_or_add(own[first : len(own) - last] + ids) is not None:
                return "near duplicate"
        seen.add(identity)
        return KEPT

    for row in itertools.chain(ahead, rows):
        yield row["index"], judge(row)


def write_filters(folder: Path, filters: RowFilters, decode: Decode | None = None) -> Counter[str]:
    """Judge a complete set's rows, list the dropped ones in its folder, and return the counts."""
    counts: Counter[str] = Counter()
    dropped: dict[str, list[int]] = {}
    for index, reason in judge_rows(iter_rows(folder), filters, decode):
        counts[reason] += 1
        if reason != KEPT:
            dropped.setdefault(reason, []).append(index)
    write_json(
        folder / FILTERS,
        {
            "settings": filters.model_dump(),
            "rows": counts.total(),
            "counts": dict(counts),
            "dropped": dropped,
        },
    )
    return counts


def kept_indices(folder: Path) -> tuple[np.ndarray, Counter[str]]:
    """Return the sorted indices of a set's kept rows, and how many rows have which reason.

    Raises:
        FastDraftError: it is not a complete set, or a part is damaged or missing.
    """
    check_set(folder)
    path = folder / FILTERS
    if not path.exists():  # a set that was written in Python and not judged
        judged = list(judge_rows(iter_rows(folder)))
        kept = np.array([index for index, reason in judged if reason == KEPT], np.int64)
        return kept, Counter(reason for _, reason in judged)
    found = json.loads(path.read_text(encoding="utf-8"))
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
    """Yield the rows of a complete set that its filters keep, by increasing index.

    Raises:
        FastDraftError: it is not a complete set, or a part is damaged or missing.
    """
    return iter_rows(folder, columns, only=kept_indices(folder)[0])


def read_kept_rows(folder: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the kept rows of a complete set as a list, and the count of every reason.

    Raises:
        FastDraftError: it is not a complete set, or a part is damaged or missing.
    """
    kept, counts = kept_indices(folder)
    return list(iter_rows(folder, only=kept)), counts


def keep_instructions(
    rows: Iterable[dict[str, Any]],
    decode: Decode,
    overlaps: Callable[[str], bool],
    *,
    suffix: Sequence[int] = (),
    special_ids: Set[int] = frozenset(),
    filters: RowFilters,
) -> tuple[list[tuple[int, ...]], Counter[str]]:
    """Return the instructions worth answering, as ids without the end of the turn, and counts.

    Reasons, in the order of the checks: ``cut off`` (the turn did not end), ``special token`` (a
    turn within a turn), ``too short`` (fewer than ``SHORTEST`` tokens), ``loop``, ``duplicate``,
    ``overlaps held-out text``, ``wrong language`` and ``near duplicate``.

    Args:
        rows: completions of the template's start, by increasing index.
        decode: ids to text.
        overlaps: whether a text overlaps held-out text (`Decontaminator.overlaps`).
        suffix: the template's ids after the user's message (`prompts.template_ends`).
        special_ids: the tokenizer's special tokens.
        filters: the language, and the similarity from which a later instruction is dropped.
    """
    language, threshold = filters.language, filters.near_duplicates
    near = None if threshold is None else NearDuplicates(threshold)
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
        text = decode(ids)
        if overlaps(text):
            return "overlaps held-out text"
        if language is not None and in_another_language(text, language):
            return "wrong language"
        if near is not None and near.find_or_add(ids) is not None:
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
