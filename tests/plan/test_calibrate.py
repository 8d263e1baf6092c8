"""Measuring a CPU: real steps and real rounds; how fast they are is not asked."""

from __future__ import annotations

from pathlib import Path

from fastdraft_hf.plan.estimate import make_plan
from fastdraft_hf.recipe import build_recipe


def test_a_cpu_is_measured_on_the_recipes_own_steps(
    tiny_target_folder: Path, tmp_path: Path
) -> None:
    stage = {"max_train_tokens": "4k", "max_length": 32, "per_device_train_batch_size": 2}
    lengths = {"prompts_per_task": 1, "max_new_tokens": 8}
    recipe = build_recipe(
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
            "evaluate": lengths,
            "bench": {
                "paths": ["transformers", "ours"],
                "num_assistant_tokens": [1, 2, 3],
                **lengths,
            },
        }
    )
    plan = make_plan(recipe, None)
    assert {"pretrain", "align", "read", "alone/0"} <= set(plan.machine.rates)
    assert any(line.startswith("measured: pretrain") for line in plan.assumptions)
    assert all(stage.seconds > 0 for stage in plan.stages)
    assert set(plan.gains[0]["speed"]) == {"transformers", "ours"}
