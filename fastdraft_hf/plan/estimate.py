"""From a job to the lines of its plan, a stage each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from fastdraft_hf.plan.job import BASE_MEMORY, FIXED, Job, loading
from fastdraft_hf.plan.measuring import (
    plan_bench,
    plan_evaluate,
    plan_export,
    plan_reduced_vocabulary,
)
from fastdraft_hf.plan.result import StagePlan
from fastdraft_hf.plan.text import plan_generate, plan_logits
from fastdraft_hf.plan.training import plan_training
from fastdraft_hf.stages.partial import PROVENANCE
from fastdraft_hf.stages.runner import STAGES, Run, grows, planned


def plan_stages(job: Job) -> list[StagePlan]:
    """Return a line for every stage the recipe has, in order."""
    return [_known(job, _plan_stage(job, name)) for name in planned(job.recipe)]


def _known(job: Job, stage: StagePlan) -> StagePlan:
    """Put in what a finished stage took."""
    if job.folder is None:
        return stage
    path = job.folder / STAGES[stage.stage].folder / PROVENANCE
    if not path.exists():
        return stage
    if grows(Run(job.recipe, job.folder), stage.stage):
        return replace(stage, notes=(*stage.notes, "of all of it: what is there already stays"))
    seconds = float(json.loads(path.read_text(encoding="utf-8"))["wall_seconds"])
    return replace(stage, finished=True, seconds=seconds)


def _plan_stage(job: Job, name: str) -> StagePlan:
    special: dict[str, Callable[[Job], StagePlan]] = {
        "design": _plan_design,
        "generate": plan_generate,
        "logits": plan_logits,
        "reduced_vocabulary": plan_reduced_vocabulary,
        "export": plan_export,
        "evaluate": plan_evaluate,
        "bench": plan_bench,
    }
    if name in special:
        return special[name](job)
    if name in job.recipe.training_stages():
        return plan_training(job, name)
    disk = 4.0 * job.draft.parameters if name == "card" else 2e6
    return StagePlan(name, False, 1, 0, 0, FIXED[name], BASE_MEMORY, disk)


def _plan_design(job: Job) -> StagePlan:
    slow = job.recipe.design.init != "scratch" and job.recipe.design.draft is None
    reads = loading(job.target) if slow else 0.0
    # Initialization are made on the CPU in float32, whatever the device.
    memory = BASE_MEMORY + 4.0 * job.draft.parameters
    memory += 4.0 * job.target.parameters if slow else 0
    notes = ("on the CPU: the memory is the machine's",) if slow and not job.cpu else ()
    seconds = FIXED["design"] + reads
    disk = 4.0 * job.draft.parameters
    return StagePlan("design", False, 1, 0, 0, seconds, memory, disk, notes=notes)
