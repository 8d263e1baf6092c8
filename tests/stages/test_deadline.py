import json
import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import deadline
from fastdraft_hf.stages.deadline import minutes, note_rates, planned_minutes, seconds_spent
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import Target

SOURCES = [{"kind": "generated", "name": "chat"}]
RECIPE = {
    "max_hours": 1,
    "generate": {
        "sets": {
            "text": {"kind": "free", "max_minutes": 4},
            "chat": {"kind": "magpie", "max_minutes": 16},
        }
    },
    "align": {"sources": SOURCES, "max_minutes": 60},
    "evaluate": {"max_minutes": 10},
    "bench": {"max_minutes": 10},
}
UNCUT = 1.0  # minutes for exports, card and report, of a target without parameters
PLANNED = (60 - UNCUT) / 100  # per minute of the recipe
Make = Callable[..., Run]


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return 60 * self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deadline, "time", clock)
    monkeypatch.setattr(deadline, "count_parameters", lambda config: 0)
    monkeypatch.setattr(deadline, "load_config", lambda *given: types.SimpleNamespace())
    return clock


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    def make(*overrides: str) -> Run:
        recipe = build_recipe(RECIPE, overrides)
        return Run(recipe, tmp_path / "run", started=0, _target=Target(tmp_path, "some/model", ""))

    return make


def finish(run: Run, stage: str, seconds: float) -> None:
    run.stage_folder(stage).mkdir(parents=True)
    record = json.dumps({"wall_seconds": seconds})
    (run.stage_folder(stage) / "provenance.json").write_text(record, encoding="utf-8")


def test_max_hours_are_shared_by_the_minutes_of_the_recipe() -> None:
    plan = planned_minutes(build_recipe(RECIPE), 0)
    weights = {"text": 4, "chat-instructions": 6.4, "chat": 9.6}
    wanted = {f"generate.{name}": weight for name, weight in weights.items()}
    wanted |= {"align": 60, "evaluate": 10, "bench": 10}
    assert plan == pytest.approx({name: PLANNED * weight for name, weight in wanted.items()})
    unset = [f"{name}.max_minutes=null" for name in ("align", "evaluate", "bench")]
    assert planned_minutes(build_recipe(RECIPE, unset), 0) == plan  # by the general recipe's
    # A larger target takes more for what cannot be cut.
    larger = planned_minutes(build_recipe(RECIPE), 7_000_000_000)["align"]
    assert larger is not None
    assert larger == pytest.approx((60 - UNCUT - 14) * 60 / 100)
    # Without the field the minutes are limits, and what has none is not limited.
    own = planned_minutes(build_recipe(RECIPE, ["max_hours=null", "align.max_minutes=null"]), 0)
    assert (own["generate.chat"], own["align"]) == (9.6, None)


def test_what_a_part_takes_or_leaves_is_for_the_later_ones(clock: Clock, make_run: Make) -> None:
    run = make_run()
    assert minutes(run, "generate.text") == pytest.approx(4 * PLANNED)
    # Early: the others share what is left, with 96 minutes of the recipe to come.
    clock.now = 1.0
    assert minutes(run, "generate.chat-instructions") == pytest.approx(6.4 * (59 - UNCUT) / 96)
    # Late by five minutes: measuring gives them, learning gets what was planned.
    finish(run, "generate", 1)
    clock.now = 60 - UNCUT - 80 * PLANNED + 5
    assert minutes(run, "align") == pytest.approx(60 * PLANNED)
    # By a quarter of an hour: measuring is halved, and learning is cut too.
    clock.now += 10
    assert minutes(run, "align") == pytest.approx(80 * PLANNED - 15 - 10 * PLANNED)
    finish(run, "align", 1)
    finish(run, "export", 1)
    clock.now = 60 - 0.25 - 6
    assert minutes(run, "evaluate") == pytest.approx(3)
    # Too late for anything: a tenth of the plan.
    clock.now = 100
    assert minutes(run, "bench") == pytest.approx(PLANNED)


def test_a_slow_target_writes_for_longer_and_the_draft_reads_less_often(
    clock: Clock, make_run: Make
) -> None:
    run = make_run()
    run.folder.mkdir()
    note_rates(run, trained=100_000)
    # The target's speed is not known yet.
    assert minutes(run, "generate.text") == pytest.approx(4 * PLANNED)
    note_rates(run, written=4000, minutes=4)
    texts = 5 * (minutes(run, "generate.text") or 0)  # a fifth of all sets
    # Of these 80 minutes; what align then trains is what eight passes over the text are.
    align = 80 * PLANNED - texts
    assert align * 100_000 == pytest.approx(8 * (4000 + 1000 * texts))
    # The rest of the time when all is written: not more than planned, whatever is left.
    finish(run, "generate", 60)
    note_rates(run, written=1000 * texts, minutes=texts)
    clock.now = 60 - UNCUT - 20 * PLANNED - align
    assert minutes(run, "align") == pytest.approx(align)


def test_a_fast_target_has_its_planned_share(clock: Clock, make_run: Make) -> None:
    run = make_run()
    run.folder.mkdir()
    note_rates(run, trained=300_000, written=700_000, minutes=10)
    assert minutes(run, "generate.text") == pytest.approx(4 * PLANNED)
    finish(run, "generate", 20 * 60 * PLANNED)
    note_rates(run, written=70_000 * 20 * PLANNED, minutes=20 * PLANNED)
    clock.now = 20 * PLANNED
    assert minutes(run, "align") == pytest.approx(60 * PLANNED)


def test_a_killed_run_keeps_its_budget(clock: Clock, make_run: Make) -> None:
    run = make_run()
    finish(run, "design", 60)
    partial = run.partial_folder("generate")
    partial.mkdir()
    sessions = {"runs": 1, "seconds": 100.0, "started": 1_000_000.0}
    (partial / "sessions.json").write_text(json.dumps(sessions), encoding="utf-8")
    os.utime(partial / "sessions.json", (1_000_020, 1_000_020))
    (partial / "rows").touch()
    os.utime(partial / "rows", (1_000_200, 1_000_200))  # then it was killed
    assert seconds_spent(run) == 60 + 100 + 200
    run.spent = seconds_spent(run)
    left = 60 - 6 - UNCUT
    measured = max(10 * PLANNED, 20 * PLANNED - (100 * PLANNED - left))
    assert minutes(run, "generate.text") == pytest.approx((left - measured) * 4 / 80)
