"""The processes of one run: who is who, and small values that all of them agree on.

``torchrun`` and ``accelerate launch`` start a run in several processes and name them by RANK and
WORLD_SIZE. A plain ``python`` is one process; nothing here then imports torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastdraft_hf._errors import FastDraftError

T = TypeVar("T")

# The others wait this long while the main process exports or benchmarks.
TIMEOUT_DAYS = 30

_group: Any = None


class MainProcessError(FastDraftError):
    """The main process failed; it reports why."""


def world() -> int:
    """Return the number of processes."""
    return _rank_and_world()[1]


def rank() -> int:
    """Return the number of this process, from 0."""
    return _rank_and_world()[0]


def is_main() -> bool:
    """Return whether this is process 0 of all machines."""
    return rank() == 0


def started() -> bool:
    """Return whether this process has joined the others."""
    return _group is not None


def start(*, cpu: bool) -> None:
    """Join the other processes and choose this one's device: ``cuda:LOCAL_RANK``, or the CPU.

    With one process this does nothing.

    Args:
        cpu: stay on the CPU and use gloo. Otherwise nccl, if there is a GPU.

    Raises:
        FastDraftError: RANK and WORLD_SIZE are invalid, or there are more processes than GPUs.
    """
    global _group
    if world() == 1 or started():
        return
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if not cpu and torch.cuda.is_available() and local > torch.cuda.device_count():
        raise FastDraftError(
            f"{local} processes on a machine with {torch.cuda.device_count()} GPUs; start one "
            "process per GPU, or set device=cpu"
        )
    timeout = timedelta(days=TIMEOUT_DAYS)
    PartialState(cpu=cpu, timeout=timeout)
    # gloo waits without load. An nccl barrier keeps its GPU busy, also while the main process
    # measures speed.
    _group = torch.distributed.new_group(backend="gloo", timeout=timeout)


def stop() -> None:
    """Leave the other processes; called at the end of a run that succeeded."""
    global _group
    if started():
        import torch

        torch.distributed.destroy_process_group()
        _group = None


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        import torch

        start(cpu=not torch.cuda.is_available())
        torch.distributed.barrier(group=_group)


def broadcast(value: T) -> T:
    """Return the main process's ``value`` in every process.

    Args:
        value: small and picklable; ignored in the other processes.
    """
    if world() == 1:
        return value
    import torch

    start(cpu=not torch.cuda.is_available())
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=_group, device=torch.device("cpu"))
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Call ``function`` in the main process and return its value in every process.

    Raises:
        BaseException: in the main process, what ``function`` raises.
        MainProcessError: in the others, when it raises.
    """
    if world() == 1:
        return function()
    result: Any = None
    if is_main():
        try:
            result = function()
        except BaseException as error:
            broadcast((str(error) or type(error).__name__, None))
            raise
    failed, value = broadcast((None, result))
    if failed is not None:
        raise MainProcessError(failed)
    return value  # type: ignore[no-any-return]


def _rank_and_world() -> tuple[int, int]:
    index, count = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise FastDraftError(
            f"RANK={index} and WORLD_SIZE={count}: RANK must be a number from 0 to WORLD_SIZE - 1"
        )
    return int(index), int(count)


# Until data/generated.py no longer polls.


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
