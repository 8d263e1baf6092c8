"""What of the target's writing is not worth training on, with counted reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

# A text whose last 60 tokens repeat with a period of at most 20 has fallen into a loop.
LOOP_TAIL, LOOP_PERIOD = 60, 20


def in_a_loop(ids: Sequence[int], tail: int = LOOP_TAIL, longest_period: int = LOOP_PERIOD) -> bool:
    """Return whether the last ``tail`` ids repeat with a period of ``longest_period`` or less."""
    if len(ids) < tail:
        return False
    end = ids[-tail:]
    return any(end[period:] == end[:-period] for period in range(1, longest_period + 1))


def keep_rows(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the rows worth training on, and how many went for which reason.

    Reasons: ``empty`` (nothing but a stop token), ``loop`` (see `in_a_loop`), ``duplicate``
    (the same prompt and completion again). Greedy repeats of one prompt are duplicates too.
    """
    kept, reasons, seen = [], Counter[str](), set()
    for row in rows:
        ids = list(row["completion_ids"])
        identity = (row["prompt_hash"], tuple(ids))
        if len(ids) - (row["finish_reason"] == "stop") < 1:
            reasons["empty"] += 1
        elif in_a_loop(ids):
            reasons["loop"] += 1
        elif identity in seen:
            reasons["duplicate"] += 1
        else:
            seen.add(identity)
            kept.append(row)
            reasons["kept"] += 1
    return kept, reasons


def keep_instructions(
    rows: Iterable[dict[str, Any]], decode: Any, overlaps: Any, shortest: int = 5
) -> tuple[list[tuple[int, ...]], Counter[str]]:
    """Return Magpie instructions worth answering, as ids without their stop token.

    Args:
        rows: what the target wrote in the user's place.
        decode: ids to text.
        overlaps: whether a text overlaps held-out text (`Decontaminator.overlaps`).
        shortest: fewest tokens of an instruction.
    """
    kept, reasons, seen = [], Counter[str](), set()
    for row in rows:
        ids = tuple(row["completion_ids"])
        if row["finish_reason"] != "stop":
            reasons["cut off"] += 1
            continue
        ids = ids[:-1]
        if len(ids) < shortest:
            reasons["too short"] += 1
        elif ids in seen:
            reasons["duplicate"] += 1
        elif in_a_loop(ids, tail=30, longest_period=10):
            reasons["loop"] += 1
        elif overlaps(decode(ids)):
            reasons["overlaps held-out text"] += 1
        else:
            seen.add(ids)
            kept.append(ids)
            reasons["kept"] += 1
    return kept, reasons
