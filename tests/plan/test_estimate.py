"""Stages of a recipe, against a run that was made; limits in minutes; finished stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from planning import QUICKSTART, QUICKSTART_TARGET, RATES, TOOK, job_of

from fastdraft_hf.plan.estimate import plan_stages
from fastdraft_hf.plan.machines import Measured
from fastdraft_hf.recipe import Recipe, read_recipe
from fastdraft_hf.tune.config import ReducedVocabularyConfig


def test_every_stage_is_within_a_quarter_of_what_it_took(quickstart: Recipe) -> None:
    stages = {
        s.stage: s for s in plan_stages(job_of(quickstart, QUICKSTART_TARGET, Measured(**RATES)))
    }
    for name, seconds in TOOK.items():
        assert stages[name].seconds == pytest.approx(seconds, rel=0.25), name
    planned = sum(stages[name].seconds for name in TOOK)
    assert planned == pytest.approx(sum(TOOK.values()), rel=0.1)
    assert stages["generate"].tokens == pytest.approx(236_747, rel=0.1)
    assert stages["generate"].memory_bytes == pytest.approx(2.47e9, rel=0.25)


def test_a_reduced_draft_is_made_exported_and_timed(quickstart: Recipe) -> None:
    more = quickstart.model_copy(update={"reduced_vocabulary": ReducedVocabularyConfig()})
    found = [
        {s.stage: s for s in plan_stages(job_of(one, QUICKSTART_TARGET, Measured(**RATES)))}
        for one in (quickstart, more)
    ]
    assert set(found[1]) - set(found[0]) == {"reduced_vocabulary"}
    assert 0 < found[1]["reduced_vocabulary"].seconds < 120
    for stage in ("export", "bench"):
        assert found[1][stage].seconds > found[0][stage].seconds, stage


def test_limits_in_minutes_hold_on_a_slow_machine(quickstart: Recipe) -> None:
    slow = {
        **RATES,
        "training": {k: v / 6 for k, v in RATES["training"].items()},
        "write_rate": 930 / 6,
        "prompt_rate": 3900 / 6,
    }
    stages = {
        s.stage: s for s in plan_stages(job_of(quickstart, QUICKSTART_TARGET, Measured(**slow)))
    }
    align = stages["align"]
    assert align.tokens == pytest.approx(60 * 4 * 2780 / 6)
    assert "cut to" in align.notes[0]
    # The limit, the steps that are timed before, evaluation and loading.
    assert 240 < align.seconds < 300
    generate = stages["generate"]
    # One limit for text and code each, two for Magpie, and the texts that were begun.
    assert 60 * (1 + 2.5 * 2 + 2) < generate.seconds < 60 * 16
    assert len([n for n in generate.notes if "max_minutes" in n]) == 4
    assert stages["pretrain"].tokens < 32_000


def test_without_limits_time_is_proportional_to_the_budget(quickstart: Recipe) -> None:
    def align(tokens: str) -> float:
        words = ["device=cpu", "align.max_minutes=null", f"align.max_train_tokens={tokens}"]
        recipe = read_recipe(QUICKSTART, words)
        found = plan_stages(job_of(recipe, QUICKSTART_TARGET, Measured(**RATES)))
        return next(s.seconds for s in found if s.stage == "align")

    assert align("20M") - align("10M") == pytest.approx(10e6 / 2780, rel=0.05)


def test_a_finished_stage_is_shown_with_its_own_time(quickstart: Recipe, tmp_path: Path) -> None:
    (tmp_path / "generate").mkdir()
    (tmp_path / "generate" / "provenance.json").write_text('{"wall_seconds": 77.5}')
    found = plan_stages(job_of(quickstart, QUICKSTART_TARGET, Measured(**RATES), folder=tmp_path))
    assert [s.stage for s in found if s.finished] == ["generate"]
    assert next(s.seconds for s in found if s.finished) == 77.5


def test_a_stage_that_has_to_go_on_is_not_finished(quickstart: Recipe, tmp_path: Path) -> None:
    (tmp_path / "generate").mkdir()
    (tmp_path / "generate" / "provenance.json").write_text('{"wall_seconds": 77.5}')
    resolved = quickstart.resolved()
    made = {key: resolved[key] for key in ("target", "target_revision", "seed", "generate")}
    made["inputs"] = {}
    (tmp_path / "generate" / "config.yaml").write_text(yaml.safe_dump(made))
    more = read_recipe(QUICKSTART, ["device=cpu", "generate.sets.more={rows: 40}"])
    for recipe, finished in ((quickstart, ["generate"]), (more, [])):
        found = plan_stages(job_of(recipe, QUICKSTART_TARGET, Measured(**RATES), folder=tmp_path))
        assert [s.stage for s in found if s.finished] == finished
    notes = next(s.notes for s in found if s.stage == "generate")
    assert any("already stays" in note for note in notes)


def test_an_export_that_is_not_cached_is_added(quickstart: Recipe) -> None:
    machine = Measured(**RATES)
    ready = plan_stages(job_of(quickstart, QUICKSTART_TARGET, machine))[1]
    new = plan_stages(job_of(quickstart, QUICKSTART_TARGET, machine, export_ready=False))[1]
    assert new.seconds - ready.seconds == pytest.approx(18.5, abs=0.5)
    assert "once a machine" in new.notes[0]


@pytest.mark.parametrize("measured", [True, False])
def test_reading_for_logits_is_reckoned_with_what_reads(measured: bool) -> None:
    """On a CPU OpenVINO reads nearly twice as fast as PyTorch (benchmarks/generation.py)."""
    rates = RATES if measured else {**RATES, "prompt_rate": None}
    seconds = {}
    for engine in ("openvino", "transformers"):
        recipe = read_recipe(QUICKSTART, ["device=cpu", f"logits={{engine: {engine}}}"])
        found = plan_stages(job_of(recipe, QUICKSTART_TARGET, Measured(**rates)))
        seconds[engine] = next(s.seconds for s in found if s.stage == "logits")
    assert 1.5 < seconds["transformers"] / seconds["openvino"] < 7
