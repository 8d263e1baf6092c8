"""Calibration on a CPU: real steps and real rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastdraft_hf.eval.bench import Setting
from fastdraft_hf.plan import calibrate
from fastdraft_hf.plan.amounts import bench_answers, evaluation_answers
from fastdraft_hf.plan.hardware import parse_hardware
from fastdraft_hf.plan.make import make_plan
from fastdraft_hf.recipe import Recipe, build_recipe


def test_the_settings_that_are_timed_are_the_benchmarks(quickstart: Recipe) -> None:
    answers = bench_answers(quickstart)
    pytorch = sum(a.count for a in answers if "openvino" not in a.setting.path)
    assert (pytorch, sum(a.count for a in answers) - pytorch) == (60, 30)
    assert sum(a.count for a in evaluation_answers(quickstart)) == 66
    timed = calibrate.ends_of([a.setting for a in answers])
    assert timed == [
        Setting("alone"),
        Setting("ours"),
        Setting("ours", "", 1),
        Setting("ours", "", 5),
        Setting("transformers", "", 1),
        Setting("transformers", "", 5),
    ]


def test_a_cpu_is_calibrated_on_the_recipes_own_steps(
    tiny_target_folder: Path, tmp_path: Path, make_tiny_recipe: Callable[[], Recipe]
) -> None:
    """Real steps and real rounds; how fast they are is not asked."""
    recipe = make_tiny_recipe()
    plan = make_plan(recipe, parse_hardware("cpu"))
    measured = [a for a in plan.assumptions if a.startswith("measured here")]
    for part in ("GFLOP/s", "pretrain:", "align:", "decoding:", "the calibration took"):
        assert any(part in line for line in measured), part
    assert all(s.seconds > 0 for s in plan.stages)
    assert set(plan.gains[0].speed) == {"transformers", "ours"}


@pytest.fixture
def make_tiny_recipe(tiny_target_folder: Path, tmp_path: Path) -> Callable[[], Recipe]:
    def make() -> Recipe:
        stage = {"max_train_tokens": "4k", "max_length": 32, "per_device_train_batch_size": 2}
        return build_recipe(
            {
                "target": str(tiny_target_folder),
                "output_dir": str(tmp_path / "run"),
                "device": "cpu",
                "design": {"hidden_size": 16, "num_hidden_layers": 1, "init": "scratch"},
                "generate": {
                    "engine": "transformers",
                    "sets": {"chat": {"rows": 8, "max_new_tokens": 16}},
                },
                "pretrain": {"sources": [{"kind": "python"}], **stage},
                "align": {"sources": [{"kind": "generated", "name": "chat"}], **stage},
                "evaluate": {"prompts_per_task": 1, "max_new_tokens": 8},
                "bench": {
                    "prompts_per_task": 1,
                    "max_new_tokens": 8,
                    "paths": ["transformers", "ours"],
                    "num_assistant_tokens": [1, 3],
                },
            }
        )

    return make
