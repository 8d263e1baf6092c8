"""Measures a draft on held-out prompts through transformers' ``generate``.

Every prompt is decoded greedily by the target alone and with the draft, in turn, so that the two
can be compared token for token and second for second; then with sampling, with the draft only,
where acceptance is what is wanted. A few prompts also run with the draft as it was before
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._progress import Progress
from fastdraft_hf.decoding.assisted import decode, greedy_margin
from fastdraft_hf.decoding.records import DecodingRecord
from fastdraft_hf.evaluation.config import EvaluateConfig
from fastdraft_hf.evaluation.journal import Journal
from fastdraft_hf.evaluation.metrics import (
    Estimate,
    acceptance_by_position,
    acceptance_rate,
    block_efficiency,
    bootstrap,
    mbsu,
    speed_ratio,
    tokens_per_second,
)
from fastdraft_hf.evaluation.prompts import EvaluationPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The runs of one prompt, in the order they are made: greedy alone and assisted stand side by
# side, so that a drift of the machine's speed falls on both.
ALONE, GREEDY, SAMPLED, UNTRAINED = "alone", "greedy", "sampled", "untrained"

# A greedy difference at a margin of the target's own logits below this is a tie between two
# kernels; above it, a fault.
TIE_MARGIN = 1e-3


def label(run: str, prompt: EvaluationPrompt) -> str:
    return f"{run}/{prompt.task}/{prompt.key}"


def collect(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    untrained: PreTrainedModel | None,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    journal: Journal,
    seed: int,
) -> None:
    """Decode every prompt in every run that the journal does not hold yet.

    Args:
        target, draft: the pair to measure.
        untrained: the draft before training; ``None`` leaves its runs out.
        prompts: as drawn; the first few of each task run with ``untrained``.
        config: lengths, γ and temperature.
        journal: where records go.
        seed: of the sampling; every prompt adds its place to it.
    """
    firsts = set()
    for task in config.tasks:
        firsts |= set([p for p in prompts if p.task == task][: config.untrained_prompts_per_task])
    plan: list[tuple[str, EvaluationPrompt, PreTrainedModel | None, float, int]] = []
    for number, prompt in enumerate(prompts):
        plan.append((ALONE, prompt, None, 0.0, seed))
        plan.append((GREEDY, prompt, draft, 0.0, seed))
        plan.append((SAMPLED, prompt, draft, config.temperature, seed + number))
        if untrained is not None and prompt in firsts:
            plan.append((UNTRAINED, prompt, untrained, config.temperature, seed + number))
    due = [step for step in plan if label(step[0], step[1]) not in journal]
    if due:
        # The first calls of a process run slowly (threads, allocator); none of them is kept.
        for model in (None, draft):
            decode(
                target,
                prompts[0].ids,
                task="warm-up",
                key="",
                max_new_tokens=8,
                temperature=0.0,
                seed=seed,
                draft=model,
                num_assistant_tokens=config.num_assistant_tokens,
                path=config.path,
            )
    with Progress("evaluate", len(plan), "answers", done=len(plan) - len(due)) as progress:
        for run, prompt, model, temperature, run_seed in due:
            record = decode(
                target,
                prompt.ids,
                task=prompt.task,
                key=prompt.key,
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
                seed=run_seed,
                draft=model,
                num_assistant_tokens=config.num_assistant_tokens if model is not None else 0,
                path=config.path,
            )
            journal.add(label(run, prompt), record)
            progress.advance(1)


def compare_greedy(
    target: PreTrainedModel, prompts: Sequence[EvaluationPrompt], journal: Journal
) -> list[dict[str, Any]]:
    """Return the prompts whose greedy tokens differ with the draft, and why.

    Each entry names the prompt, the first differing place, the target's margin there in logits,
    and whether that margin explains it (``tie``).
    """
    differences: list[dict[str, Any]] = []
    for prompt in prompts:
        alone = journal[label(ALONE, prompt)].tokens
        assisted = journal[label(GREEDY, prompt)].tokens
        if alone == assisted:
            continue
        where = {"task": prompt.task, "key": prompt.key}
        pairs = zip(alone, assisted, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if place is None:
            differences.append({**where, "place": None, "tie": False})
            continue
        margin = greedy_margin(target, (*prompt.ids, *alone[:place]))
        differences.append({**where, "place": place, "margin": margin, "tie": margin < TIE_MARGIN})
    return differences


def summarize(
    prompts: Sequence[EvaluationPrompt],
    journal: Journal,
    config: EvaluateConfig,
    *,
    target_parameters: int,
    draft_parameters: int,
    differences: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the figures of an evaluation as one JSON-ready mapping."""
    ratio = draft_parameters / target_parameters
    gamma = config.num_assistant_tokens

    def records(run: str, task: str | None) -> list[DecodingRecord]:
        chosen = [p for p in prompts if task in (None, p.task)]
        return [journal[label(run, p)] for p in chosen if label(run, p) in journal]

    def figures(task: str | None) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for run in (SAMPLED, GREEDY, UNTRAINED):
            taken = records(run, task)
            if not taken:
                continue
            efficiency = bootstrap(taken, block_efficiency)
            result[run] = {
                "prompts": len(taken),
                "drafted": sum(r.drafted for r in taken),
                "acceptance_rate": _triple(bootstrap(taken, acceptance_rate)),
                "block_efficiency": _triple(efficiency),
                "mbsu": [mbsu(v, ratio, gamma) for v in _triple(efficiency)],
                "acceptance_by_position": acceptance_by_position(taken),
            }
        alone, assisted = records(ALONE, task), records(GREEDY, task)
        result["greedy_wall_clock"] = {
            "alone_tokens_per_second": tokens_per_second(alone),
            "assisted_tokens_per_second": tokens_per_second(assisted),
            "ratio": _triple(speed_ratio(assisted, alone)),
        }
        return result

    return {
        "num_assistant_tokens": gamma,
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "target_parameters": target_parameters,
        "draft_parameters": draft_parameters,
        "cost_ratio": ratio,
        "greedy_prompts": len(prompts),
        "greedy_identical": len(prompts) - len(differences),
        "greedy_differences": differences,
        "tasks": {task: figures(task) for task in config.tasks},
        "overall": figures(None),
    }


def save_path(folder: Path) -> Path:
    """Return where an evaluation keeps its records."""
    return folder / "records.jsonl"


def _triple(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]
