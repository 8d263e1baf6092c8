"""The energy of a stage, read by codecarbon where the hardware has counters; unknown elsewhere.

CPUs count with RAPL, NVIDIA GPUs with NVML. Both count for the whole processor, whoever uses it,
and not for memory, disks or fans. codecarbon's estimates for hardware without counters are not
used.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastdraft_hf._processes import world
from fastdraft_hf.recipe import Recipe

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Joules by processor (``cpu``, ``gpu``). ``None``: it is there, and its energy is unknown.
Joules = dict[str, float | None]


@contextlib.contextmanager
def measured_energy(recipe: Recipe, stage: str) -> Iterator[Joules]:
    """Yield a dictionary that holds the joules by processor when the block has ended.

    A failure of the measurement leaves them unknown and never stops the stage.
    """
    import torch

    joules: Joules = {"cpu": None}
    if torch.cuda.is_available():
        joules["gpu"] = None
    tracker = _quietly(_start) if _all_here(recipe, stage) else None
    yield joules
    if tracker is not None:
        joules |= _quietly(lambda: _counted(tracker)) or {}


def _quietly(function: Callable[[], T]) -> T | None:
    try:
        return function()
    except Exception as error:
        logger.debug("energy is unknown: %s", error)
        return None


def _start() -> Any:
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").disabled = True
    # The country only decides how much carbon dioxide a joule is, which is not recorded.
    tracker = OfflineEmissionsTracker(
        country_iso_code="USA", save_to_file=False, allow_multiple_runs=True
    )
    tracker.start()
    return tracker


def _counted(tracker: Any) -> Joules:
    """Stop the tracker; return the joules of those processors that have counters."""
    tracker.stop()
    found: Joules = {}
    data = tracker.final_emissions_data
    for one in tracker._hardware:  # codecarbon 3 reports only there whether it estimates
        if getattr(one, "_mode", None) == "intel_rapl":
            found["cpu"] = data.cpu_energy * 3.6e6
        elif type(one).__name__ == "GPU":
            found["gpu"] = data.gpu_energy * 3.6e6
    return found


def _all_here(recipe: Recipe, stage: str) -> bool:
    """Return whether the whole stage runs on this machine."""
    if world() > 1 and os.environ.get("LOCAL_WORLD_SIZE") != str(world()):
        return False
    if stage != "generate" or recipe.generate is None:
        return True
    host = urlsplit(recipe.generate.server or "http://localhost").hostname
    return host in ("localhost", "127.0.0.1", "::1")


def energy_facts(runs: Sequence[Joules | None]) -> dict[str, Any]:
    """Return the energy of a stage over all of its runs.

    Args:
        runs: joules by processor of each run; ``None`` for one that was killed.

    Returns:
        ``energy_joules_of``: joules by processor, of those that every run measured;
        ``energy_joules``: their sum, if no processor is unknown. Unknown values are left out.
    """
    known: dict[str, float] = {}
    names = {name for run in runs for name in run or {}}
    for name in sorted(names):
        # A run on a machine without that processor used none of its energy.
        parts = [None if run is None else run.get(name, 0.0) for run in runs]
        if None not in parts:
            known[name] = round(sum(part or 0.0 for part in parts), 1)
    if not known:
        return {}
    total = {"energy_joules": round(sum(known.values()), 1)} if len(known) == len(names) else {}
    return {"energy_joules_of": known, **total}
