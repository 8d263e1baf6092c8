"""A stage's partial folder: what stays of it, its runs so far, and the lock of a run."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_text
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main
from fastdraft_hf.stages.run import CONFIG, PROVENANCE

logger = logging.getLogger(__name__)

# The runs of a stage so far, in its partial folder.
SESSIONS = "sessions.json"


def contents(folder: Path) -> set[str]:
    """Return the names of what a stage made in a folder."""
    return {entry.name for entry in folder.iterdir()} - {CONFIG, PROVENANCE, SESSIONS}


def move_aside(partial: Path, keeps: Collection[str], stage: str) -> None:
    """Remove from a partial folder what other settings made invalid; nothing is deleted.

    Args:
        partial: the folder.
        keeps: names in it that are still valid.
        stage: whose folder it is, for the log.
    """
    stale = sorted(contents(partial).difference(keeps))
    kept = sorted(contents(partial).intersection(keeps))
    if not stale:
        return
    aside = partial.with_name(f"{partial.name}-{time.time_ns()}")
    what = f"; kept: {', '.join(kept)}; moved: {', '.join(stale)}" if kept else ""
    logger.warning("%s: started with other settings; moved to %s%s", stage, aside, what)
    if not kept:
        partial.rename(aside)
        return
    aside.mkdir()
    # The old settings stay until the caller writes new ones. A run that is killed before that finds
    # them different and does the same again.
    write_text(aside / CONFIG, (partial / CONFIG).read_text(encoding="utf-8"))
    for name in stale:
        (partial / name).rename(aside / name)


def earlier_sessions(partial: Path) -> list[dict[str, Any]]:
    """Return the earlier runs of a partial folder: when each started and how long it took."""
    path = partial / SESSIONS
    found: list[dict[str, Any]] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    )
    if found and found[-1]["seconds"] is None:  # killed; the newest file says when
        last = max(file.stat().st_mtime for file in partial.rglob("*"))
        found[-1]["seconds"] = max(0.0, last - found[-1]["started"])
    return found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, in the main process; a killed process releases it.

    Raises:
        FastDraftError: another run holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FastDraftError(f"another fastdraft process works in {folder}") from None

    on_main(acquire)
    try:
        yield
    finally:
        lock.release()
