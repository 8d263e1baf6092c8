"""What of the target's writing is not worth training on, with counted reasons.

Nothing is thrown away on disk. When a set is finished, `write_filters` puts into its folder which
rows were left out and why, and `read_kept_rows` gives every later stage the same rows, without the
recipe, the tokenizer or the language classifier.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fastdraft_hf._atomic import write_json
from fastdraft_hf._config import Number, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.generated import read_rows
from fastdraft_hf.data.languages import in_another_language
from fastdraft_hf.data.near_duplicates import NearDuplicates
from fastdraft_hf.data.prompts import shared_ends

FILTERS = "filters.json"
KEPT = "kept"

# A text whose last 60 tokens repeat with a period of at most 20 has fallen into a loop, and so has
# one that ends with three times the same 80 tokens or fewer.
LOOP_TAIL, LOOP_PERIOD = 60, 20
LONG_LOOP_PERIOD, LONG_LOOP_TIMES = 80, 3
# A text of at least 100 tokens repeats itself when more than half of its runs of six tokens stood
# in it before: lists that count on and say the same thing again.
REPETITIVE_LENGTH, REPETITIVE_RUN, REPETITIVE_SHARE = 100, 6, 0.5

_CODE = re.compile(r"[a-z]{2,3}")

Decode = Callable[[Sequence[int]], str]


class RowFilters(Section):
    """Which rows a training stage leaves out, besides empty ones, loops and duplicates."""

    cut_off: Literal["keep", "drop"] = Field(
        "keep", description="texts that hit max_new_tokens: their beginning is as good as any"
    )
    near_duplicates: Number | None = Field(
        0.8,
        description=(
            "similarity from which a later row counts as a near duplicate (Jaccard index of runs "
            "of five tokens, prompt and answer together); empty: they are not looked for"
        ),
    )
    language: str | None = Field(
        None,
        description=(
            "ISO 639-1 code: texts that are surely in another language are left out (needs the "
            "extra fastdraft_hf[language])"
        ),
    )

    def check_values(self) -> None:
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise FastDraftError(
                f"near_duplicates: above 0 and at most 1, or empty; got {self.near_duplicates}"
            )
        # Whether it is known, the stage finds out (`languages.check_language`): a recipe is read on
        # machines without the classifier, too.
        if self.language is not None and not _CODE.fullmatch(self.language):
            raise FastDraftError(
                f"language: '{self.language}' is no language code; ISO 639-1 has two letters (en, "
                "de, zh)"
            )


def in_a_loop(ids: Sequence[int], tail: int = LOOP_TAIL, longest_period: int = LOOP_PERIOD) -> bool:
    """Return whether the last ``tail`` ids repeat with a period of ``longest_period`` or less."""
    if len(ids) < tail:
        return False
    end = ids[-tail:]
    return any(end[period:] == end[:-period] for period in range(1, longest_period + 1))


def in_a_long_loop(ids: Sequence[int]) -> bool:
    """Return whether the text ends with ``LONG_LOOP_TIMES`` repeats of up to 80 ids."""
    return any(
        in_a_loop(ids[-LONG_LOOP_TIMES * period :], LONG_LOOP_TIMES * period, period)
        for period in range(LOOP_PERIOD + 1, LONG_LOOP_PERIOD + 1)
        # A cheap look first: most texts part here.
        if len(ids) >= LONG_LOOP_TIMES * period and ids[-1] == ids[-1 - period]
    )


def repeats_itself(ids: Sequence[int]) -> bool:
    """Return whether more than half of the runs of ``REPETITIVE_RUN`` ids came before."""
    if len(ids) < REPETITIVE_LENGTH:
        return False
    runs = list(zip(*(ids[place:] for place in range(REPETITIVE_RUN)), strict=False))
    return len(set(runs)) < (1 - REPETITIVE_SHARE) * len(runs)


def judge_rows(
    rows: Sequence[dict[str, Any]],
    filters: RowFilters | None = None,
    decode: Decode | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return for every row ``kept`` or why it is left out.

    Reasons, in the order they are looked for: ``empty`` (nothing but a stop token), ``cut off``
    (it hit the length limit; when asked), ``loop`` (see `in_a_loop` and `in_a_long_loop`),
    ``repetition`` (see `repeats_itself`), ``duplicate`` (the same prompt and completion again;
    greedy repeats of one prompt are that too), ``wrong language`` (when asked), ``near duplicate``
    (see `near_duplicates`; what all prompts of the set begin or end with does not count into the
    similarity).

    Args:
        rows: of `generated.read_rows`.
        filters: what to look for besides empty texts, loops and duplicates; nothing when missing.
        decode: ids to text, needed for ``filters.language``.
        on_row: called once a row.
    """
    wanted = filters or RowFilters(near_duplicates=None)
    if wanted.language is not None and decode is None:
        raise ValueError("a language needs decode")
    near = None if wanted.near_duplicates is None else NearDuplicates(wanted.near_duplicates)
    first, last = shared_ends([row["prompt_ids"] for row in rows]) if near is not None else (0, 0)
    seen: set[tuple[Any, ...]] = set()

    def judge(row: dict[str, Any]) -> str:
        ids = list(row["completion_ids"])
        identity = (row["prompt_hash"], tuple(ids))
        stopped = row["finish_reason"] == "stop"
        if len(ids) - stopped < 1:
            return "empty"
        if not stopped and wanted.cut_off == "drop":
            return "cut off"
        text = ids[:-1] if stopped else ids  # one that looped and then stopped has looped
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

    reasons = []
    for row in rows:
        reasons.append(judge(row))
        on_row()
    return reasons


def keep_rows(
    rows: Iterable[dict[str, Any]],
    filters: RowFilters | None = None,
    decode: Decode | None = None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the rows worth training on, and how many went for which reason (`judge_rows`)."""
    listed = list(rows)
    reasons = judge_rows(listed, filters, decode)
    kept = [row for row, reason in zip(listed, reasons, strict=True) if reason == KEPT]
    return kept, Counter(reasons)


def write_filters(
    folder: Path, rows: Sequence[dict[str, Any]], reasons: Sequence[str], filters: RowFilters
) -> None:
    """Write into a finished set's folder which rows are left out, by their ``index``."""
    dropped: dict[str, list[int]] = {}
    for row, reason in zip(rows, reasons, strict=True):
        if reason != KEPT:
            dropped.setdefault(reason, []).append(row["index"])
    write_json(
        folder / FILTERS,
        {
            "settings": filters.model_dump(),
            "rows": len(rows),
            "counts": dict(Counter(reasons)),
            "dropped": dropped,
        },
    )


def read_kept_rows(folder: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the rows of a finished set that its filters keep, and the count of every reason.

    A set without filters of its own (made by an earlier version) gets those of `keep_rows`.

    Raises:
        FastDraftError: the set is unfinished or damaged, or its filters belong to other rows.
    """
    rows = read_rows(folder)
    path = folder / FILTERS
    if not path.exists():
        return keep_rows(rows)
    found = json.loads(path.read_text(encoding="utf-8"))
    dropped = {index for indices in found["dropped"].values() for index in indices}
    kept = [row for row in rows if row["index"] not in dropped]
    counts: Counter[str] = Counter({k: len(v) for k, v in found["dropped"].items()})
    if found["rows"] != len(rows) or len(kept) + sum(counts.values()) != len(rows):
        raise FastDraftError(f"{path}: it belongs to other rows; delete the set's folder and rerun")
    if kept:
        counts[KEPT] = len(kept)
    return kept, counts
