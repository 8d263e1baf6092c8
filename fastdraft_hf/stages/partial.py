"""A stage's folder while it is worked on: taken up again, or moved aside; one process at a time."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import publish_folder, write_json, write_text
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main
from fastdraft_hf.stages.compare import CONFIG

logger = logging.getLogger(__name__)

PROVENANCE = "provenance.json"
# When a stage ran so far, in its partial folder.
SESSIONS = "sessions.json"


def move_aside(partial: Path, keeps: Collection[str], stage: str) -> None:
    """Take from a partial folder of other settings what they made useless: often all of it.

    Args:
        partial: the folder.
        keeps: names of its files and folders that are still good; those that are there stay.
        stage: whose folder it is, for the log.
    """
    kept = {entry.name for entry in partial.iterdir()}.intersection(keeps)
    aside = partial.with_name(f"{partial.name}-{time.time_ns()}")
    if not kept:
        logger.warning("%s: begun with other settings; moved aside to %s", stage, aside)
        partial.rename(aside)
        return
    logger.warning(
        "%s: begun with other settings; kept: %s; the rest was moved aside to %s",
        stage,
        ", ".join(sorted(kept)),
        aside,
    )
    aside.mkdir()
    # The settings stay till the caller writes new ones: a run that is killed before finds that they
    # differ, and does the same again.
    stay = {*kept, CONFIG, SESSIONS}
    write_text(aside / CONFIG, (partial / CONFIG).read_text(encoding="utf-8"))
    for entry in sorted(partial.iterdir()):
        if entry.name not in stay:
            entry.rename(aside / entry.name)


def reopen(folder: Path, partial: Path) -> None:
    """Make a finished stage one that was begun; the time and energy it took stay known."""
    record = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    session = {
        "started": folder.stat().st_mtime - record["wall_seconds"],
        "seconds": record["wall_seconds"],
        "energy": record.get("energy_joules_of"),
    }
    write_json(folder / SESSIONS, [session])
    if partial.exists():
        partial.rename(partial.with_name(f"{partial.name}-{time.time_ns()}"))
    publish_folder(folder, partial)


def modified(path: Path) -> float:
    """Return when a file was last written; 0 for a folder, and for what another process renamed."""
    try:
        return path.stat().st_mtime if path.is_file() else 0.0
    except FileNotFoundError:
        return 0.0


def open_sessions(partial: Path) -> list[dict[str, Any]]:
    """Return the earlier runs of a partial folder: when each started and how long it took."""
    path = partial / SESSIONS
    found: list[dict[str, Any]] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    )
    if found and found[-1]["seconds"] is None:  # killed; the newest file says when
        last = max(modified(file) for file in partial.rglob("*"))
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
