"""Energy counters, on a folder like Linux's and a module like NVML's; this machine has neither."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastdraft_hf.stages.registry  # noqa: F401  (fills STAGES, which a fixture replaces)
from fastdraft_hf.recipe import Recipe, build_recipe
from fastdraft_hf.stages import energy
from fastdraft_hf.stages import runner as run
from fastdraft_hf.stages.energy import (
    EnergyMeter,
    NvidiaGPUs,
    RaplPackages,
    UnknownEnergyError,
    energy_facts,
    open_counters,
)
from fastdraft_hf.stages.runner import Run, Stage, execute
from fastdraft_hf.target.resolve import Target

RANGE = 262_143_328_850


class Powercap:
    """Two packages with a core domain each, and the domains that are no packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, kind in {
            "intel-rapl:0": "package-0",
            "intel-rapl:0:0": "core",
            "intel-rapl:0:1": "dram",
            "intel-rapl:1": "package-1",
            "intel-rapl:2": "psys",
            "intel-rapl-mmio:0": "package-0",
        }.items():
            folder = root / name
            folder.mkdir(parents=True)
            (folder / "name").write_text(f"{kind}\n")
            (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
            (folder / "energy_uj").write_text("1000000\n")

    def set(self, name: str, microjoules: int) -> None:
        new = self.root / "new"
        new.write_text(f"{microjoules}\n")
        new.replace(self.root / name / "energy_uj")  # a reader of sysfs sees no half of a number


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    return Powercap(tmp_path / "powercap")


class TestRapl:
    def test_packages_are_added_up_and_nothing_else(self, powercap: Powercap) -> None:
        counter = RaplPackages(powercap.root, lambda: 0.0)
        for name in ("intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:2", "intel-rapl-mmio:0"):
            powercap.set(name, 900_000_000)
        assert counter.advance() == 0
        powercap.set("intel-rapl:0", 3_500_000)
        powercap.set("intel-rapl:1", 2_000_000)
        assert counter.advance() == pytest.approx(2.5 + 1.0)
        assert counter.advance() == 0

    @given(st.integers(0, RANGE - 1), st.integers(0, RANGE - 1))
    def test_it_wraps_around(
        self, tmp_path_factory: pytest.TempPathFactory, first: int, used: int
    ) -> None:
        powercap = Powercap(tmp_path_factory.mktemp("p") / "powercap")
        powercap.set("intel-rapl:0", first)
        counter = RaplPackages(powercap.root, lambda: 0.0)
        powercap.set("intel-rapl:0", (first + used) % RANGE)
        assert counter.advance() == pytest.approx(used / 1e6)

    def test_a_pause_that_may_hide_a_round_is_unknown(self, powercap: Powercap) -> None:
        now = [0.0]
        counter = RaplPackages(powercap.root, lambda: now[0])
        now[0] = 200.0
        assert counter.advance() == 0
        now[0] += RANGE / 1e6 / energy.MOST_WATTS + 1
        with pytest.raises(UnknownEnergyError, match="not read for 263 s"):
            counter.advance()

    def test_what_cannot_be_read_is_unknown(self, powercap: Powercap, tmp_path: Path) -> None:
        with pytest.raises(UnknownEnergyError, match="no package"):
            RaplPackages(tmp_path / "nothing")
        counter = RaplPackages(powercap.root)
        powercap.set("intel-rapl:0", 5_000_000)
        second = powercap.root / "intel-rapl:1" / "energy_uj"
        second.unlink()
        second.mkdir()  # as root reads any file, a folder stands for one that is refused
        with pytest.raises(UnknownEnergyError):
            counter.advance()  # half of the machine is no measurement
        with pytest.raises(UnknownEnergyError):
            RaplPackages(powercap.root)


class FakeNvml:
    """As ``pynvml``: handles by index and UUID, millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, *millijoules: int) -> None:
        self.used, self.broken = list(millijoules), False

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.used):
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if self.broken:
            raise self.NVMLError("Not Supported")
        return self.used[handle]


class TestNvml:
    @pytest.mark.parametrize(
        ("visible", "joules"),
        [(None, 1 + 2 + 4), ("0", 1), ("2,1", 6), ("GPU-1", 2), (" 0 , 2 ", 5)],
    )
    def test_visible_gpus_are_added_up(
        self, visible: str | None, joules: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        nvml = FakeNvml(5000, 6000, 7000)
        counter = NvidiaGPUs(nvml)
        nvml.used = [6000, 8000, 11000]
        assert counter.advance() == pytest.approx(joules)
        assert counter.advance() == 0

    @pytest.mark.parametrize("visible", ["MIG-4a", "7", ""])
    def test_what_has_no_counter_is_unknown(
        self, visible: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(UnknownEnergyError):
            NvidiaGPUs(FakeNvml(1))

    def test_a_driver_that_fails_or_starts_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        nvml = FakeNvml(5000)
        first, second = NvidiaGPUs(nvml), NvidiaGPUs(nvml)
        nvml.used = [10]
        with pytest.raises(UnknownEnergyError, match="loaded anew"):
            first.advance()
        nvml.broken = True
        with pytest.raises(UnknownEnergyError, match="Not Supported"):
            second.advance()
        with pytest.raises(UnknownEnergyError, match="Not Loaded"):
            NvidiaGPUs(nvml)
        with pytest.raises(UnknownEnergyError, match="no GPU"):
            NvidiaGPUs(FakeNvml())


class Steady:
    """Counts a joule a reading, and may fail at one."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.readings, self.fails_at = 0, fails_at

    def advance(self) -> float:
        self.readings += 1
        if self.readings == self.fails_at:
            raise UnknownEnergyError("gone")
        return 1.0


class TestMeter:
    def test_it_reads_while_the_block_runs(self) -> None:
        seen: list[float | None] = []
        enough = threading.Event()

        def keep(joules: energy.Joules) -> None:
            seen.append(joules["cpu"])
            if len(seen) == 4:
                enough.set()

        with EnergyMeter({"cpu": Steady()}, keep, seconds=0.001) as meter:
            assert enough.wait(30)
        assert meter.joules["cpu"] == len(seen)
        assert seen == sorted(seen, key=lambda joules: joules or 0)
        readings = len(seen)
        assert not [t for t in threading.enumerate() if t.name == "energy"]
        assert len(seen) == readings

    def test_once_unknown_it_stays_so(self) -> None:
        with EnergyMeter({"cpu": Steady(fails_at=2), "gpu": Steady()}, seconds=60) as meter:
            meter.sample()
        assert meter.joules == {"cpu": None, "gpu": 3.0}

    def test_the_last_reading_is_kept_when_the_block_fails(self) -> None:
        seen: list[energy.Joules] = []

        def stage() -> None:
            with EnergyMeter({"cpu": Steady()}, seen.append, seconds=60):
                raise RuntimeError("a server is gone")

        with pytest.raises(RuntimeError, match="gone"):
            stage()
        assert seen[-1] == {"cpu": 2.0}

    def test_a_full_disk_does_not_end_a_stage(self) -> None:
        def full(joules: energy.Joules) -> None:
            raise OSError(28, "No space left on device")

        with EnergyMeter({"cpu": Steady()}, full, seconds=60) as meter:
            pass
        assert meter.joules == {"cpu": 2.0}

    def test_without_counters_there_is_no_thread(self) -> None:
        with EnergyMeter({"cpu": None}, seconds=0.001) as meter:
            assert not [t for t in threading.enumerate() if t.name == "energy"]
        assert meter.joules == {"cpu": None}


@pytest.mark.parametrize(
    ("runs", "facts"),
    [
        ([{"cpu": 2.0}], {"energy_joules_of": {"cpu": 2.0}, "energy_joules": 2.0}),
        (
            [{"cpu": 2.0, "gpu": 30.0}, {"cpu": 1.0, "gpu": 10.0}],
            {"energy_joules_of": {"cpu": 3.0, "gpu": 40.0}, "energy_joules": 43.0},
        ),
        ([{"cpu": None, "gpu": 30.0}], {"energy_joules_of": {"gpu": 30.0}}),
        ([{"cpu": 2.0, "gpu": None}], {"energy_joules_of": {"cpu": 2.0}}),
        # Gone on with on a machine that has no GPU.
        (
            [{"cpu": 2.0, "gpu": 30.0}, {"cpu": 1.0}],
            {"energy_joules_of": {"cpu": 3.0, "gpu": 30.0}, "energy_joules": 33.0},
        ),
        ([{"cpu": None}], {}),
        ([{"cpu": 2.0}, {"cpu": None}], {}),
        ([None, {"cpu": 2.0}], {}),  # begun by a version that measured nothing
        ([], {}),
    ],
)
def test_what_a_record_says(runs: list[Any], facts: dict[str, Any]) -> None:
    assert energy_facts(runs) == facts


class TestCountersOfAMachine:
    @pytest.fixture(autouse=True)
    def _machine(self, powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(RaplPackages.__init__, "__defaults__", (powercap.root, lambda: 0.0))
        monkeypatch.setattr(energy, "_has_accelerator", lambda: True)
        nvml = FakeNvml(1)
        monkeypatch.setattr(energy.importlib, "import_module", lambda name: nvml)

    def known(self, stage: str = "align", **generate: Any) -> set[str]:
        sets = {"chat": {"rows": 4}}
        recipe = build_recipe({"generate": {"sets": sets, **generate}})
        return {name for name, counter in open_counters(recipe, stage).items() if counter}

    def test_both(self) -> None:
        assert self.known() == {"cpu", "gpu"}

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(energy, "_has_accelerator", lambda: False)
        assert set(open_counters(Recipe(), "align")) == {"cpu"}

    def test_without_nvml_the_gpu_is_unknown_and_not_absent(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(name: str) -> None:
            raise ModuleNotFoundError(name)

        monkeypatch.setattr(energy.importlib, "import_module", missing)
        found = open_counters(Recipe(), "align")
        assert found["gpu"] is None
        assert found["cpu"] is not None

    def test_processes_of_other_machines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "16")
        assert self.known("generate") == set()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        assert self.known("generate") == set()
        monkeypatch.setenv("WORLD_SIZE", "8")
        assert self.known("generate") == {"cpu", "gpu"}

    def test_servers_of_other_machines(self) -> None:
        here, there = "http://localhost:8000/v1", "http://10.0.0.2:8000/v1"
        assert self.known("generate", server=here) == {"cpu", "gpu"}
        assert self.known("generate", server=[here, there]) == set()
        assert self.known("align", server=there) == {"cpu", "gpu"}


@pytest.fixture
def metered_run(
    tmp_path: Path, powercap: Powercap, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[], None]], Run]:
    """Make a run of stage design alone, whose work is given, on a machine with two packages."""
    monkeypatch.setattr(energy, "_has_accelerator", lambda: False)
    monkeypatch.setattr(RaplPackages.__init__, "__defaults__", (powercap.root, lambda: 0.0))

    def make(work: Callable[[], None]) -> Run:
        def stage(run: Run, folder: Path) -> dict[str, Any]:
            work()
            return {}

        stages = {"design": Stage(stage, lambda r: r.design, (), "design")}
        monkeypatch.setattr(run, "STAGES", stages)
        recipe = build_recipe({"target": "some/model"})
        return Run(recipe, tmp_path / "run", _target=Target(tmp_path, "some/model", "abc"))

    return make


def record(run: Run) -> dict[str, Any]:
    text = (run.stage_folder("design") / "provenance.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def test_a_stage_records_what_it_used_over_its_runs(
    metered_run: Callable[..., Run], powercap: Powercap
) -> None:
    def first() -> None:
        powercap.set("intel-rapl:0", 8_000_000)
        raise RuntimeError("a full disk")

    with pytest.raises(RuntimeError):
        execute(metered_run(first), ["design"])
    powercap.set("intel-rapl:0", 500_000_000)  # between the runs: others' work
    made = metered_run(lambda: powercap.set("intel-rapl:1", 4_000_000))
    execute(made, ["design"])
    found = record(made)
    assert found["runs"] == 2
    assert found["energy_joules"] == pytest.approx(7.0 + 3.0)
    assert found["energy_joules_of"] == {"cpu": pytest.approx(10.0)}


def test_a_killed_run_counts_up_to_its_last_reading(
    metered_run: Callable[..., Run], powercap: Powercap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in a forked process: nothing of it is run after the signal."""
    monkeypatch.setattr(EnergyMeter.__init__, "__defaults__", (lambda joules: None, 0.01))
    partial = metered_run(lambda: None).folder / ".design.partial" / "sessions.json"

    def work() -> None:
        powercap.set("intel-rapl:0", 6_000_000)
        until = time.monotonic() + 60
        while json.loads(partial.read_text())[-1].get("energy") != {"cpu": 5.0}:
            assert time.monotonic() < until
        os.kill(os.getpid(), 9)

    killed = metered_run(work)
    child = os.fork()
    if child == 0:
        try:
            execute(killed, ["design"])
        finally:
            os._exit(1)  # whatever happened: a copy of this test must not go on
    assert os.waitpid(child, 0)[1] == 9
    made = metered_run(lambda: powercap.set("intel-rapl:0", 8_000_000))
    execute(made, ["design"])
    assert record(made)["energy_joules"] == pytest.approx(5.0 + 2.0)


def test_where_nothing_is_measured_the_record_says_nothing(
    metered_run: Callable[..., Run], powercap: Powercap
) -> None:
    (powercap.root / "intel-rapl:1" / "energy_uj").unlink()
    made = metered_run(lambda: None)
    execute(made, ["design"])
    assert not [key for key in record(made) if key.startswith("energy")]
