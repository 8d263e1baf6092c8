"""A finished set that is asked for more rows becomes one that was begun.

Rows are numbered, and a row's prompt, temperature and seed follow from its number, so the rows of
a larger set begin with those of the smaller one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.shards import (
    MANIFEST,
    STATE,
    begun_path,
    read_sound,
    shard_number,
    sign_path,
    write_facts,
    write_shard,
)


def asks_for_more(folder: Path, requests: int, max_minutes: float | None) -> bool:
    """Return whether a finished set was asked for fewer rows than ``requests``.

    Args:
        folder: of the set.
        requests: rows it is asked for now.
        max_minutes: what the set may take; one that was cut off by it is as large as it gets.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    # Sets of earlier versions do not say what they were asked for.
    asked = manifest.get("requests", manifest["rows"])
    return max_minutes is None and asked < requests


def reopen(folder: Path, requests: int, rows_per_shard: int) -> None:
    """Make a finished set one that was begun: whole shards stay, rows of others are kept apart.

    Killed at any time, it is either still finished or can be gone on with; no row is lost.

    Args:
        folder: of the set.
        requests: rows it will have.
        rows_per_shard: of sets of earlier versions, which do not say it.

    Raises:
        FastDraftError: a shard is missing or damaged, or has other rows than its number says.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    size = manifest.get("rows_per_shard", rows_per_shard)
    apart: list[dict[str, Any]] = []
    short: list[Path] = []
    for name, digest in manifest["shards"].items():
        path = folder / name
        rows = read_sound(path, digest)
        first = shard_number(path) * size
        if not all(first <= row["index"] < first + size for row in rows):
            raise FastDraftError(
                f"{path}: not a shard of {size} rows; set generate.rows_per_shard to what this set "
                "was made with"
            )
        if len(rows) < min(size, requests - first):
            apart += rows
            short.append(path)
        else:
            write_facts(path, digest, rows)
    if apart:
        write_shard(begun_path(folder, 0), apart)
    write_json(
        sign_path(folder, 0, 1), {"seconds": manifest.get("seconds", 0.0), "finished": False}
    )
    write_json(folder / STATE, {"rows_per_shard": size})
    (folder / MANIFEST).unlink()
    # Without facts these are written anew, from the rows kept apart.
    for path in short:
        path.unlink()
