"""The processes of one run: who is who, and small values that all of them agree on.

``torchrun`` and ``accelerate launch`` start a run in several processes and name them by RANK and
WORLD_SIZE. A plain ``python`` is one process; nothing here then imports torch.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from fastdraft_hf._errors import FastDraftError

T = TypeVar("T")

_SS_DISABLE = 2 if sys.platform == "linux" else 4

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
    timeout = timedelta(days=30)  # the others wait while the main process exports or benchmarks
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


class _SignalStack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2)."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def drop_signal_stack() -> None:
    """Let this thread's signal handlers run on its ordinary stack.

    OpenVINO 2026 gives the thread that loads its CPU plugin a stack for signal handlers, and leaves
    a freed one behind once several cores or pipelines have come and gone. The next signal with a
    handler (SIGINT; SIGCHLD once a DataLoader has had workers) would end the process by SIGSEGV.
    """
    sigaltstack = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "sigaltstack", None)
    if sigaltstack is not None:
        sigaltstack(ctypes.byref(_SignalStack(None, _SS_DISABLE, 0)), None)
