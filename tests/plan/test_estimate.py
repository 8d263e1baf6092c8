"""Stages of a recipe against a run that was measured; limits; finished stages; whole plans."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from fastdraft_hf import FastDraftError
from fastdraft_hf.draft.design import design_draft
from fastdraft_hf.eval.metrics import acceptance_of_rate
from fastdraft_hf.plan.estimate import (
    Job,
    Plan,
    StagePlan,
    assumed_acceptance,
    make_plan,
)
from fastdraft_hf.plan.machines import DEVICES, cpu_machine, parse_hardware, shape_of
from fastdraft_hf.recipe import Recipe, build_recipe, read_recipe

ROOT = Path(__file__).parents[2]
TARGETS = ROOT / "tests" / "fixtures" / "targets"
QUICKSTART = ROOT / "recipes" / "smollm2-135m" / "quickstart.yaml"
PHI3 = ROOT / "recipes" / "phi-3-mini" / "50m.yaml"

# What a run of the quickstart measured on two quiet CPU cores (2026-11-23): the wall time of stages
# that train or decode, and the rates of its own records.
RATES = {
    "pretrain": 2100.0,
    "continue": 2150.0,
    "align": 2780.0,
    "read": 613.0,
    "alone/0": 0.0459,
    "ours/0": 0.0306,
    "ours/1": 0.0366,
    "ours/5": 0.0601,
    "transformers/1": 0.0841,
    "transformers/5": 0.1016,
}
TOOK = {
    "design": 2.5,
    "pretrain": 23.6,
    "continue": 27.9,
    "align": 212.9,
    "evaluate": 134.0,
    "bench": 199.5,
}


def target_of(folder: Path, name: str) -> str:
    """Return a folder with only a config.json, as a recipe's target."""
    shutil.copy(TARGETS / f"{name}.json", folder / "config.json")
    return f"target={folder}"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    target = tmp_path / "target"
    target.mkdir()
    return [
        "device=cpu",
        target_of(target, "smollm2-135m-instruct"),
        f"output_dir={tmp_path / 'run'}",
    ]


def job_of(recipe: Recipe, rates: dict[str, float] = RATES, flops: float = 2e11) -> Job:
    target = AutoConfig.from_pretrained(recipe.target)
    shapes = shape_of(target), shape_of(design_draft(target, recipe.design))
    return Job(recipe, *shapes, cpu_machine(flops, 2e10, rates), acceptance_of_rate(0.134, 3))


def stages(recipe: Recipe, *given: Any) -> dict[str, StagePlan]:
    return {stage.stage: stage for stage in job_of(recipe, *given).stages()}


def test_every_stage_is_within_a_quarter_of_what_it_took(words: list[str]) -> None:
    found = stages(read_recipe(QUICKSTART, words))
    for name, seconds in TOOK.items():
        assert found[name].seconds == pytest.approx(seconds, rel=0.25), name
    assert found["generate"].memory_bytes == pytest.approx(2.47e9, rel=0.25)


def test_limits_in_minutes_cut_text_and_tokens(words: list[str]) -> None:
    slow = {name: rate if "/" in name else rate / 6 for name, rate in RATES.items()}
    found = stages(read_recipe(QUICKSTART, words), slow, 3e10)
    align, generate = found["align"], found["generate"]
    assert align.tokens == pytest.approx(60 * 4 * 2780 / 6)
    assert "cut to" in align.notes[0]
    assert 240 < align.seconds < 300  # the limit, evaluation and loading
    # One limit for text and code each, two for Magpie, and the completions that were started.
    assert 60 * (1 + 2.5 * 2 + 2) < generate.seconds < 60 * 16
    assert len([n for n in generate.notes if "max_minutes" in n]) == 4
    assert found["pretrain"].tokens < 32_000


def test_optional_stages_cost_something(words: list[str]) -> None:
    plain = stages(read_recipe(QUICKSTART, words))
    more = [*words, "reduced_vocabulary={}", "logits={engine: transformers}"]
    found = stages(read_recipe(QUICKSTART, more))
    assert set(found) - set(plain) == {"reduced_vocabulary", "logits"}
    assert 0 < found["reduced_vocabulary"].seconds < 120
    assert found["logits"].seconds > 60
    for stage in ("export", "bench"):
        assert found[stage].seconds > plain[stage].seconds, stage


def test_a_finished_stage_is_shown_with_its_own_time(words: list[str], tmp_path: Path) -> None:
    recipe = read_recipe(QUICKSTART, words)
    folder = tmp_path / "run" / "generate"
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text('{"wall_seconds": 77.5}')
    resolved = recipe.resolved()
    made = {key: resolved[key] for key in ("target", "target_revision", "seed", "generate")}
    (folder / "config.yaml").write_text(yaml.safe_dump({**made, "inputs": {}}))
    found = stages(recipe)
    assert [name for name, stage in found.items() if stage.finished] == ["generate"]
    assert found["generate"].seconds == 77.5


def test_assumed_acceptance_rises_with_the_budget_between_what_is_known() -> None:
    def rate(tokens: str) -> float:
        pretrain = {"sources": [{"kind": "python"}], "max_train_tokens": tokens}
        return assumed_acceptance(build_recipe({"pretrain": pretrain}))

    assert rate("64k") == rate("640k") == assumed_acceptance(build_recipe({})) == 0.134
    assert 0.134 < rate("30M") < rate("1B") < 0.466
    assert rate("12.5B") == rate("50B") == 0.466


def plan_phi3(folder: Path, hardware: str, *words: str, **options: Any) -> Plan:
    target = target_of(folder, "phi-3-mini-4k-instruct")
    recipe = read_recipe(PHI3, ["device=cuda", target, f"output_dir={folder}", *words])
    machine = parse_hardware(hardware)
    assert machine is not None
    return make_plan(recipe, dataclasses.replace(machine, **options))


@pytest.mark.parametrize("share", [0.2, 0.03])
def test_the_papers_recipe_takes_under_a_day_on_eight_gaudi_2(tmp_path: Path, share: float) -> None:
    """The paper says 24 hours."""
    plan = plan_phi3(tmp_path, "8xGaudi2", train=share)
    assert plan.seconds < 24 * 3600
    tokens = {s.stage: s.tokens for s in plan.stages}
    assert (tokens["pretrain"], tokens["continue"]) == (5e9, 7.5e9)
    assert all(s.memory_bytes < DEVICES["Gaudi2"].memory for s in plan.stages)


def test_parallel_stages_divide_by_the_number_of_devices(tmp_path: Path) -> None:
    plans = [plan_phi3(tmp_path, hardware) for hardware in ("1xH100", "8xH100")]
    one, eight = ({s.stage: s for s in plan.stages} for plan in plans)
    for name in ("generate", "pretrain"):
        assert one[name].seconds / eight[name].seconds == pytest.approx(8, rel=0.05)
    assert one["bench"].seconds == eight["bench"].seconds
    assert eight["bench"].devices == 1
    assert plans[0].gains == plans[1].gains


def test_gains_are_the_formulas(words: list[str]) -> None:
    job = job_of(read_recipe(QUICKSTART, words))
    found = job.gains()
    assert [g["num_assistant_tokens"] for g in found] == [1, 2, 3, 5]
    three, one = found[2], found[0]
    assert three["block_efficiency"] == pytest.approx(1 + 3 * 0.134, abs=1e-3)
    cost = 11_600_832 / 134_515_008
    assert three["mbsu"] == pytest.approx((1 + 3 * 0.134) / (3 * cost + 1), abs=1e-3)
    # Over our loop with nothing drafted, the same kernels.
    alone, drafted = job._round("ours", 0), job._round("ours", 1)
    assert one["speed"]["ours"] == pytest.approx(one["block_efficiency"] * alone / drafted)
    # The run measured 0.69 at γ = 1.
    assert one["speed"]["transformers"] == pytest.approx(0.69, rel=0.2)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "zz"}'])
def test_a_config_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FastDraftError, match=str(tmp_path)):
        make_plan(build_recipe({"target": str(tmp_path)}), DEVICES["H100"])
