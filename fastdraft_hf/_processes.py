"""Several processes that work on one folder: who is who, and waiting for one another.

Processes are told apart as ``torchrun`` and ``accelerate launch`` do it, by RANK and WORLD_SIZE,
and speak through files only: nodes need share nothing but a disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastdraft_hf._errors import FastDraftError


@dataclass(frozen=True)
class Process:
    """One of ``count`` processes, numbered from 0."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


def this_process() -> Process:
    """Return which process this is, from RANK and WORLD_SIZE.

    Raises:
        FastDraftError: they are no numbers, or no process of the world.
    """
    index, count = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise FastDraftError(f"RANK={index} and WORLD_SIZE={count} name no process")
    return Process(int(index), int(count))


def wait_until(
    done: Callable[[], bool],
    folder: Path,
    what: Callable[[], str],
    minutes: float,
    poll_seconds: float = 0.2,
) -> None:
    """Return when ``done()``; give up when nothing in ``folder`` has changed for ``minutes``.

    Args:
        done: asked again and again.
        folder: where the others write; a change of any file in it is a sign of life.
        what: what is waited for, for the error message.
        minutes: longest time without a sign.
        poll_seconds: time between two questions.

    Raises:
        FastDraftError: the time is over.
    """
    seen: object = None
    # The others' clocks may differ, so only changes count, and this clock measures between them.
    since = time.monotonic()
    while not done():
        signs = _signs(folder)
        if signs != seen:
            seen, since = signs, time.monotonic()
        elif time.monotonic() - since > 60 * minutes:
            raise FastDraftError(
                f"{folder}: waited {minutes:g} minutes for {what()}, and nothing in the folder "
                "changed; what is finished is kept, start all processes again to go on"
            )
        time.sleep(poll_seconds)


def _signs(folder: Path) -> set[tuple[str, int]]:
    signs = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    signs.add((entry.name, entry.stat().st_mtime_ns))
                except FileNotFoundError:  # renamed between the two calls
                    continue
    except FileNotFoundError:
        pass
    return signs
