"""Recipes of this repository, what one of them took when it was run, and jobs to plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdraft_hf.plan.acceptance import chance_of
from fastdraft_hf.plan.hardware import Hardware
from fastdraft_hf.plan.job import Job
from fastdraft_hf.plan.make import draft_config_of, find_config
from fastdraft_hf.plan.shapes import shape_of
from fastdraft_hf.recipe import Recipe

ROOT = Path(__file__).parents[2]
TARGETS = ROOT / "tests" / "fixtures" / "targets"
QUICKSTART = ROOT / "recipes" / "smollm2-135m" / "quickstart.yaml"
QUICKSTART_TARGET = TARGETS / "smollm2-135m-instruct.json"
PHI3 = ROOT / "recipes" / "phi-3-mini" / "50m.yaml"
PHI3_TARGET = TARGETS / "phi-3-mini-4k-instruct.json"

# What a run of the quickstart measured on two quiet CPU cores (2026-11-23): the wall time of each
# stage, and rates out of its own records, except that of writing and of reading prompts, which
# were fitted to it. So this guards the arithmetic; it is no evidence that a plan comes true. Stage
# export has since got its comparisons and is left out.
RATES: dict[str, Any] = {
    "flops": 2e11,
    "bandwidth": 2e10,
    "training": {"pretrain": 2100.0, "continue": 2150.0, "align": 2780.0},
    "write_rate": 930.0,
    "prompt_rate": 3900.0,
    "rounds": {
        ("alone", 0): 0.0459,
        ("ours", 0): 0.0306,
        ("ours", 1): 0.0366,
        ("ours", 5): 0.0601,
        ("transformers", 1): 0.0841,
        ("transformers", 5): 0.1016,
    },
    "first_token": 0.2446,
    "first_token_prompt": 150,
}
TOOK = {
    "design": 2.5,
    "generate": 300.0,
    "pretrain": 23.6,
    "continue": 27.9,
    "align": 212.9,
    "evaluate": 134.0,
    "bench": 199.5,
}


def job_of(recipe: Recipe, config: Path, machine: Any, **options: Any) -> Job:
    """Return a job on this machine's CPU, by default with the quickstart's acceptance."""
    target, _ = find_config(recipe, config)
    shapes = shape_of(target), shape_of(draft_config_of(recipe, target))
    options = {"chance": chance_of(0.134, 3), **options}
    return Job(recipe, *shapes, Hardware(1, None), machine, **options)
