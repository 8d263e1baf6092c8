"""Which commands a plan prints. That they do what it says: `tests/test_recipes.py`."""

from __future__ import annotations

from typing import Any

import pytest
from planning import PHI3, PHI3_TARGET

from fastdraft_hf.plan.commands import commands, engine_of, not_launched
from fastdraft_hf.plan.hardware import parse_hardware
from fastdraft_hf.plan.make import make_plan
from fastdraft_hf.recipe import Recipe, read_recipe


def phi3(*overrides: str) -> Recipe:
    return read_recipe(PHI3, ["device=cuda", *overrides])


def lines(recipe: Recipe, hardware: str, *overrides: str) -> dict[str, str]:
    found = commands(recipe, parse_hardware(hardware), "r.yaml", overrides)
    return {stage: command.line for command in found for stage in command.stages}


@pytest.mark.parametrize("hardware", ["cpu", "1xH100", "1xMI300X"])
def test_one_device_is_one_run(hardware: str) -> None:
    assert set(lines(phi3(), hardware, "seed=3", "target=a b").values()) == {
        "fastdraft run r.yaml seed=3 'target=a b'"
    }


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("pretrain.sources=[{kind: python}]", "pretrain.sources are not what"),
        ("continue.sources.0.data_dir=data/python", "data_dir"),
        ("pretrain.max_minutes=5", "pretrain.max_minutes"),
        ("align.trainer_args={label_smoothing_factor: 0.1}", "trainer_args"),
        ("align.lora={r: 8}", "lora"),
        ("align.objective=kl", "the target's distribution"),
        ("evaluate.tasks={mine: {dataset: org/mine, column: prompt}}", "task sets of your own"),
    ],
)
def test_what_the_script_cannot_do_is_planned_on_one_device(override: str, why: str) -> None:
    recipe = phi3(override)
    assert why in str(not_launched(recipe))
    found = lines(recipe, "8xH100")
    assert found["generate"].startswith("torchrun --nproc_per_node 8 ")
    assert found["pretrain"] == found["bench"] == "CUDA_VISIBLE_DEVICES=0 fastdraft run r.yaml"
    plans = {
        hardware: make_plan(recipe, parse_hardware(hardware), target_config=PHI3_TARGET)
        for hardware in ("1xH100", "8xH100")
    }
    one, eight = ({s.stage: s for s in plan.stages} for plan in plans.values())
    for stage in ("pretrain", "continue", "align"):
        assert eight[stage].devices == 1
        assert eight[stage].seconds == pytest.approx(one[stage].seconds)
        assert f"on one device ({not_launched(recipe)})" in eight[stage].notes
    assert eight["generate"].devices == 8


def test_settings_that_differ_are_told_to_the_script() -> None:
    words = ["align.learning_rate=2e-3", "align.matrix_optimizer=adamw", "align.warmup=0.1"]
    words += ["align.gradient_accumulation_steps=4", "align.sources=[{name: code}]", "seed=7"]
    line = lines(phi3(*words), "8xH100")["align"]
    for told in (
        "--learning_rate 0.002",
        "--matrix_optimizer adamw",
        "--warmup_steps 0.1",
        "--gradient_accumulation_steps 4",
        "--generated_sets code ",
        "--seed 7",
    ):
        assert told in f"{line} "


def test_servers() -> None:
    urls = "generate.server=[http://a:1/v1, http://b:1/v1]"
    recipe = phi3(urls)
    assert engine_of(recipe, parse_hardware("8xH100")) == "vllm"
    assert lines(recipe, "8xH100")["generate"] == "fastdraft generate --config r.yaml"
    assert engine_of(phi3(), parse_hardware("8xH100")) == "transformers"
    assert engine_of(phi3(), parse_hardware("8xGaudi2")) == "vllm"


def stages(hardware: str, *overrides: str) -> dict[str, Any]:
    plan = make_plan(phi3(*overrides), parse_hardware(hardware), target_config=PHI3_TARGET)
    return {stage.stage: stage for stage in plan.stages}


def test_processes_wait_for_the_one_with_most_shards() -> None:
    """5,500 rows are six shards: eight processes are no faster than six."""
    one_set = "generate.sets={code: {kind: code, rows: 5500, max_new_tokens: 512}}"
    align = "align.sources=[{name: code}]"
    few = {count: stages(f"{count}xH100", one_set, align)["generate"] for count in (1, 6, 8)}
    assert few[8].seconds == pytest.approx(few[6].seconds)
    assert few[8].devices == 6
    small = stages("8xH100", one_set, align, "generate.rows_per_shard=256")["generate"]
    assert small.devices == 8
    assert small.seconds < few[8].seconds
    assert few[8].tokens == few[1].tokens


def test_an_accelerator_that_is_not_cudas_measures_on_the_host() -> None:
    plan = make_plan(phi3(), parse_hardware("8xGaudi2"), target_config=PHI3_TARGET)
    found = {stage.stage: stage for stage in plan.stages}
    for name in ("export", "evaluate", "bench"):
        assert any("the host's CPU" in note for note in found[name].notes), name
    assert found["evaluate"].seconds == pytest.approx(
        stages("1xGaudi3")["evaluate"].seconds  # the same host, whatever is beside it
    )
    said = " ".join(plan.assumptions)
    assert "200 GB/s" in said
    assert "a vLLM server on each device" in said
    assert not any("host" in n for s in stages("8xH100").values() for n in s.notes)


def test_streams_need_no_disk() -> None:
    streamed = stages("1xH100")["pretrain"].scratch_bytes
    kept = stages("1xH100", "pretrain.streaming=false")["pretrain"].scratch_bytes
    assert kept - streamed == 2 * 5e9  # token shards of a vocabulary below 2^16
