"""Which sets of a begun stage generate stay good when its settings change."""

from __future__ import annotations

from typing import Any

# Which held-out text the prompts of a folder were checked against.
HELD_OUT = "held_out.json"


def only_more(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether settings only add sets, or rows to sets: what is written then stays and is gone on.

    The first rows of a larger set are those of the smaller one. Not so where time ends a set: which
    rows it has then depends on what was in flight.
    """
    if {**old, "sets": None} != {**new, "sets": None}:
        return False
    return all(_more_of(had, new["sets"].get(name)) for name, had in old["sets"].items())


def _more_of(old: dict[str, Any], new: dict[str, Any] | None) -> bool:
    if new is None or {**old, "rows": None} != {**new, "rows": None}:
        return False
    grew: bool = new["rows"] > old["rows"] and new["max_minutes"] is None
    return grew or new["rows"] == old["rows"]


def unchanged(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what of a folder stays good: sets that did not change, or only ask for more rows."""
    if {**old, "sets": None} != {**new, "sets": None}:
        return []
    same = [name for name, had in old["sets"].items() if _more_of(had, new["sets"].get(name))]
    asked = [f"{name}-instructions" for name in same if old["sets"][name]["kind"] == "magpie"]
    return [*same, *asked, HELD_OUT] if same else []
