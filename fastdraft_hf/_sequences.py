"""Sequences of tokens, compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """Return the first place where two sequences differ, ``None`` where none does.

    Where one is the other's beginning, that is the place after its end.
    """
    shorter = min(len(one), len(other))
    pairs = enumerate(zip(one, other, strict=False))
    at_end = None if len(one) == len(other) else shorter
    return next((place for place, (a, b) in pairs if a != b), at_end)


__all__ = ["first_difference"]
