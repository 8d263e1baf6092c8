"""The one exception type for bad input: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastDraftError(ValueError):
    """Bad input, or a condition the user can fix. The command line prints it as one line."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the valid name closest to ``name``, else ``""``."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
