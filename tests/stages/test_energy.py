"""The energy of a stage: of processors with counters, over all of its runs."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fastdraft_hf.recipe import Recipe, build_recipe
from fastdraft_hf.stages.energy import energy_facts, measured_energy


class GPU:
    """Has the name of codecarbon's class."""


RAPL, ESTIMATED = SimpleNamespace(_mode="intel_rapl"), SimpleNamespace(_mode="cpu_load")


@pytest.fixture
def codecarbon(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A codecarbon whose trackers have the attributes of the object."""
    fake = SimpleNamespace(hardware=[RAPL, GPU()], fails=False, started=0)

    class Tracker:
        def __init__(self, **options: Any) -> None:
            assert options["save_to_file"] is False
            self._hardware = fake.hardware
            self.final_emissions_data = SimpleNamespace(cpu_energy=1.0, gpu_energy=2.0)

        def start(self) -> None:
            fake.started += 1

        def stop(self) -> None:
            if fake.fails:
                raise OSError("the counter is gone")

    module = SimpleNamespace(OfflineEmissionsTracker=Tracker, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return fake


def measure(recipe: Recipe, stage: str = "align") -> dict[str, float | None]:
    with measured_energy(recipe, stage) as joules:
        assert joules == {"cpu": None, "gpu": None}
    return joules


def test_counters_are_read_and_estimates_are_not(codecarbon: Any) -> None:
    assert measure(Recipe()) == {"cpu": 3.6e6, "gpu": 7.2e6}
    codecarbon.hardware = [ESTIMATED, GPU()]
    assert measure(Recipe()) == {"cpu": None, "gpu": 7.2e6}


def test_a_failure_never_stops_a_stage(codecarbon: Any) -> None:
    codecarbon.fails = True
    assert measure(Recipe()) == {"cpu": None, "gpu": None}


def test_work_elsewhere_is_not_measured(codecarbon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def served(server: str) -> Recipe:
        return build_recipe({"generate": {"server": server}})

    assert measure(served("http://localhost:8000"), "generate")["gpu"] is not None
    assert measure(served("http://gpu-7:8000"), "generate")["gpu"] is None
    assert measure(served("http://gpu-7:8000"), "align")["gpu"] is not None
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert measure(Recipe())["gpu"] is None


def test_the_real_tracker_works_offline() -> None:
    pytest.importorskip("codecarbon")
    with measured_energy(Recipe(), "align") as joules:
        pass
    assert all(value is None or value >= 0 for value in joules.values())


@pytest.mark.parametrize(
    ("runs", "joules", "total"),
    [
        ([], None, None),
        ([{"cpu": None}], None, None),
        ([{"cpu": 1.0}, {"cpu": 2.0}], {"cpu": 3.0}, 3.0),
        ([{"cpu": None, "gpu": 4.0}], {"gpu": 4.0}, None),
        ([{"cpu": 1.0}, None], None, None),  # one was killed
        ([{"cpu": 1.0}, {"cpu": 1.0, "gpu": 2.0}], {"cpu": 2.0, "gpu": 2.0}, 4.0),
    ],
)
def test_facts_hold_what_every_run_measured(runs: Any, joules: Any, total: Any) -> None:
    facts = energy_facts(runs)
    assert (facts.get("energy_joules_of"), facts.get("energy_joules")) == (joules, total)
