"""Sequences of tokens, compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """Return the first position at which two sequences differ, ``None`` if they are equal.

    If one is a prefix of the other, that is the position after its end.
    """
    shorter = min(len(one), len(other))
    pairs = enumerate(zip(one, other, strict=False))
    at_end = None if len(one) == len(other) else shorter
    return next((position for position, (a, b) in pairs if a != b), at_end)
