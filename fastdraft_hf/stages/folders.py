"""A stage's folders: what they were made with, how they resume, and the lock of a run."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import publish_folder, write_json, write_text
from fastdraft_hf._config import Section, load
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import on_main

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
# The runs of a stage so far, in its partial folder.
SESSIONS = "sessions.json"
_RECORDS = {CONFIG, PROVENANCE, SESSIONS}


def contents(folder: Path) -> set[str]:
    """Return the names of what a stage made in a folder."""
    return {entry.name for entry in folder.iterdir()} - _RECORDS


def move_aside(partial: Path, keeps: Collection[str], stage: str) -> None:
    """Remove from a partial folder what other settings made invalid; nothing is deleted.

    Args:
        partial: the folder.
        keeps: names in it that are still valid.
        stage: whose folder it is, for the log.
    """
    stale = contents(partial).difference(keeps)
    kept = contents(partial).intersection(keeps)
    if not stale:
        return
    aside = partial.with_name(f"{partial.name}-{time.time_ns()}")
    if not kept:
        logger.warning("%s: started with other settings; moved to %s", stage, aside)
        partial.rename(aside)
        return
    logger.warning(
        "%s: started with other settings; kept: %s; moved to %s: %s",
        stage,
        ", ".join(sorted(kept)),
        aside,
        ", ".join(sorted(stale)),
    )
    aside.mkdir()
    # The old settings stay until the caller writes new ones. A run that is killed before that finds
    # them different and does the same again.
    write_text(aside / CONFIG, (partial / CONFIG).read_text(encoding="utf-8"))
    for name in sorted(stale):
        (partial / name).rename(aside / name)


def reopen(folder: Path, partial: Path) -> None:
    """Make a finished stage a partial one; its time and energy so far stay recorded."""
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


def _modified(path: Path) -> float:
    """Return when a file was last written; 0 for a folder, and for a file that is gone."""
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
        last = max(_modified(file) for file in partial.rglob("*"))
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


def deciding(section: Section) -> list[str]:
    """Return the settings that decide what a stage makes, not where or how fast."""
    return [name for name in type(section).model_fields if name not in section.RUNTIME_ONLY]


def with_defaults(section: Section, made: dict[str, Any]) -> dict[str, Any]:
    """Return a section's mapping with the defaults written out at every depth.

    A mapping that is no longer valid is returned unchanged; it differs in any case.
    """
    try:
        return dict(load(type(section), made).model_dump())
    except FastDraftError:
        return made


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yield the differences between two configurations, one readable line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(
                old.get(key), new.get(key), f"{path}.{key}" if path else str(key)
            )
    elif old != new:
        yield f"{path}: {old} then, {new} now"


def read_config(folder: Path) -> Any:
    """Return what a stage's folder was made with, ``None`` without a record."""
    import yaml

    path = folder / CONFIG
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
