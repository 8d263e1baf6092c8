"""What a stage's processors used, where their own counters can be read; unknown otherwise.

CPUs: RAPL's package domains, as Linux shows them in ``/sys/class/powercap`` (kernel documentation,
``power/powercap/powercap.rst``). NVIDIA GPUs: NVML's ``nvmlDeviceGetTotalEnergyConsumption``, if
``nvidia-ml-py`` is installed. Both count for the whole processor, whoever uses it, and neither
counts memory, disks, fans or the power supply.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastdraft_hf._processes import world
from fastdraft_hf.recipe import Recipe

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
# Seconds between two readings; a killed run has lost what it used after the last.
SAMPLE_SECONDS = 5.0
# No package draws more. A pause in which such a one could have wrapped around makes it unknown.
MOST_WATTS = 1000.0

# Joules by processor (``cpu``, ``gpu``). ``None``: it is there, and what it used is not known.
Joules = dict[str, float | None]


class UnknownEnergyError(Exception):
    """A counter cannot be read, or may have wrapped around more than once."""


class Counter(Protocol):
    """Counts from when it was made."""

    def advance(self) -> float:
        """Return the joules since the last call.

        Raises:
            UnknownEnergyError: they cannot be told.
        """
        ...


@dataclass
class _Package:
    file: Path
    range: int
    last: int


class RaplPackages:
    """All CPU packages of this machine.

    Domains inside a package (cores, graphics) are part of it; ``psys`` and ``dram`` are none.

    Args:
        root: the folder of powercap.
        clock: seconds, for the time between two readings.

    Raises:
        UnknownEnergyError: there is no package, or one cannot be read (Linux lets only root).
    """

    def __init__(self, root: Path = POWERCAP, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        try:
            self._packages = [
                _Package(
                    folder / "energy_uj",
                    int((folder / "max_energy_range_uj").read_text()),
                    int((folder / "energy_uj").read_text()),
                )
                for folder in sorted(root.glob("intel-rapl:*"))
                if (folder / "name").read_text().startswith("package")
            ]
        except (OSError, ValueError) as error:
            raise UnknownEnergyError(str(error)) from error
        if not self._packages:
            raise UnknownEnergyError(f"{root} has no package")
        self._time = clock()

    def advance(self) -> float:
        now = self._clock()
        passed, self._time = now - self._time, now
        used = 0
        for package in self._packages:
            try:
                value = int(package.file.read_text())
            except (OSError, ValueError) as error:
                raise UnknownEnergyError(str(error)) from error
            if passed * MOST_WATTS * 1e6 > package.range:
                raise UnknownEnergyError(f"not read for {passed:.0f} s")
            more = value - package.last
            used += more if more >= 0 else more + package.range
            package.last = value
        return used / 1e6


class NvidiaGPUs:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves visible.

    Args:
        nvml: the module ``pynvml``.

    Raises:
        UnknownEnergyError: NVML does not start, a GPU does not count, or is a part of one (MIG).
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._last = [(handle, self._read(handle)) for handle in self._visible()]
        except (nvml.NVMLError, ValueError) as error:
            raise UnknownEnergyError(str(error)) from error
        if not self._last:
            raise UnknownEnergyError("NVML knows no GPU")

    def _visible(self) -> list[Any]:
        nvml, wanted = self._nvml, os.environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        # A number is taken for NVML's; among unequal GPUs CUDA's own order may be another.
        return [
            nvml.nvmlDeviceGetHandleByUUID(name)
            if name.startswith("GPU-")
            else nvml.nvmlDeviceGetHandleByIndex(int(name))
            for name in (part.strip() for part in wanted.split(","))
        ]

    def _read(self, handle: Any) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle))  # mJ

    def advance(self) -> float:
        used, seen = 0, []
        for handle, last in self._last:
            try:
                value = self._read(handle)
            except self._nvml.NVMLError as error:
                raise UnknownEnergyError(str(error)) from error
            if value < last:
                raise UnknownEnergyError("the driver was loaded anew")
            used += value - last
            seen.append((handle, value))
        self._last = seen
        return used / 1e3


def open_counters(recipe: Recipe, stage: str) -> dict[str, Counter | None]:
    """Return the counters of this machine's processors, ``None`` for one that cannot be read.

    A stage whose work is not all done on this machine (processes elsewhere, servers elsewhere) has
    only unknown ones.
    """
    found: dict[str, Counter | None] = {"cpu": None}
    if _has_accelerator():
        found["gpu"] = None
    if not _all_here(recipe, stage):
        return found
    with contextlib.suppress(UnknownEnergyError):
        found["cpu"] = RaplPackages()
    if "gpu" in found:
        with contextlib.suppress(UnknownEnergyError, ImportError):
            found["gpu"] = NvidiaGPUs(importlib.import_module("pynvml"))
    return found


def _has_accelerator() -> bool:
    import torch

    known = getattr(torch, "accelerator", None)  # PyTorch 2.6
    return bool(torch.cuda.is_available() if known is None else known.is_available())


def _all_here(recipe: Recipe, stage: str) -> bool:
    count = world()
    if count > 1 and os.environ.get("LOCAL_WORLD_SIZE") != str(count):
        return False
    if stage != "generate" or recipe.generate is None:
        return True
    hosts = {urlsplit(server).hostname for server in recipe.generate.servers}
    return hosts <= {"localhost", "127.0.0.1", "::1"}


class EnergyMeter:
    """Adds up counters while the block runs; a thread reads them again and again.

    Args:
        counters: by processor; ``None`` for one that cannot be read.
        on_sample: called with `joules` after every reading, to keep them over a kill.
        seconds: between two readings.

    Attributes:
        joules: used so far.
    """

    def __init__(
        self,
        counters: Mapping[str, Counter | None],
        on_sample: Callable[[Joules], None] = lambda joules: None,
        seconds: float = SAMPLE_SECONDS,
    ) -> None:
        self._counters = dict(counters)
        self._on_sample, self._seconds = on_sample, seconds
        self._ended, self._lock = Event(), Lock()
        self._thread: Thread | None = None
        self.joules: Joules = {
            name: None if counter is None else 0.0 for name, counter in counters.items()
        }

    def __enter__(self) -> EnergyMeter:
        self.sample()
        if any(self._counters.values()):
            self._thread = Thread(target=self._watch, name="energy", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self.sample()

    def sample(self) -> None:
        """Read the counters. One that fails is unknown from then on."""
        with self._lock:
            for name, counter in self._counters.items():
                used = self.joules[name]
                if counter is None or used is None:
                    continue
                try:
                    self.joules[name] = used + counter.advance()
                except UnknownEnergyError as error:
                    logger.debug("energy of the %s is unknown: %s", name, error)
                    self.joules[name] = None
            # A full disk is the stage's to report; a measurement must not end it.
            with contextlib.suppress(OSError):
                self._on_sample(dict(self.joules))


def energy_facts(runs: Sequence[Joules | None]) -> dict[str, Any]:
    """Return what a stage's record says of its energy, over all of its runs.

    Args:
        runs: joules by processor of each run; ``None`` for one that measured nothing.

    Returns:
        ``energy_joules_of``: joules by processor, of those known in every run; ``energy_joules``:
        their sum, where no processor that was there is unknown. What is unknown is left out.
    """
    known: dict[str, float] = {}
    if not runs or any(run is None for run in runs):
        return {}
    names = dict.fromkeys(name for run in runs if run is not None for name in run)
    for name in names:
        # A run on a machine without that processor used none.
        parts = [run[name] for run in runs if run is not None and name in run]
        if all(part is not None for part in parts):
            known[name] = round(sum(part for part in parts if part is not None), 1)
    facts: dict[str, Any] = {}
    if known:
        facts["energy_joules_of"] = known
    if known and len(known) == len(names):
        facts["energy_joules"] = round(sum(known.values()), 1)
    return facts
