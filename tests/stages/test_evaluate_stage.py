"""Stage evaluate on a tiny pair: several settings, a task of one's own, and the report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdraft_hf import FastDraftError
from fastdraft_hf.eval.summary import acceptance_rows, read_summary
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import report
from fastdraft_hf.stages.runner import Run, execute
from fastdraft_hf.target.resolve import Target


@pytest.fixture
def make_run(tmp_path: Path, tiny_target_folder: Path) -> Callable[..., Run]:
    lines = "\n".join(f"the cat and the hat, {n} of them" for n in range(6))
    (tmp_path / "asked.txt").write_text(lines, encoding="utf-8")

    def make(**settings: Any) -> Run:
        data = {
            "device": "cpu",
            "design": {"hidden_size": 16, "num_hidden_layers": 1, "params": "1k"},
            "evaluate": {
                "tasks": {"mine": {"dataset": str(tmp_path / "asked.txt")}},
                "prompts_per_task": 3,
                "max_new_tokens": 8,
                "num_assistant_tokens": [2, 3],
                "temperature": [2.0, 4.0],
                **settings,
            },
        }
        return Run(build_recipe(data), tmp_path / "run", Target(tiny_target_folder, "tiny"))

    return make


def test_it_measures_every_setting_and_the_report_reads_it(make_run: Callable[..., Run]) -> None:
    run = make_run()
    execute(run, ["design", "evaluate"])
    path = run.stage_folder("evaluate") / "results.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert len(found["settings"]) == 5
    assert found["not_held_out"] == []
    assert found["greedy_identical"] == 3
    summary = read_summary(run.folders)
    assert summary.evaluation == found
    assert [(r["task set"], r["γ"]) for r in acceptance_rows(found)] == [
        (task, gamma) for task in ("mine", "overall") for gamma in "23232"
    ]
    headings = [heading for heading, _ in report._samples(run)]
    assert [h.split(":")[0].split(", ")[1] for h in headings] == ["greedy", "sampled"]


def test_a_bad_task_stops_before_the_models_are_loaded(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(max_prompt_tokens=2)
    execute(run, ["design"])
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **g: pytest.fail("loaded")
    )
    with pytest.raises(FastDraftError, match="no prompt of mine is as short as 2 tokens"):
        execute(run, ["evaluate"])
