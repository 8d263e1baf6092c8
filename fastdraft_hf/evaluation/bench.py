"""Wall clock of the target alone and with the draft over γ, in turn, on each path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastdraft_hf._progress import Progress
from fastdraft_hf.decoding.records import DecodingRecord
from fastdraft_hf.evaluation.config import BenchConfig
from fastdraft_hf.evaluation.journal import Journal
from fastdraft_hf.evaluation.metrics import (
    acceptance_rate,
    block_efficiency,
    speed_ratio,
    tokens_per_second,
)
from fastdraft_hf.evaluation.prompts import EvaluationPrompt

# (prompt, γ) -> record; γ = 0 is the target alone.
Decode = Callable[[EvaluationPrompt, int], DecodingRecord]


def label(path: str, gamma: int, repeat: int, prompt: EvaluationPrompt) -> str:
    return f"{path}/{gamma}/{repeat}/{prompt.task}/{prompt.key}"


def collect(
    path: str,
    decode: Decode,
    prompts: Sequence[EvaluationPrompt],
    config: BenchConfig,
    journal: Journal,
) -> None:
    """Time every prompt in every setting, greedily, settings in turn within a prompt.

    Alone, γ₁, γ₂, … follow one another on one prompt before the next prompt comes, so a drift of
    the machine's speed falls on all settings alike.
    """
    gammas = [0, *config.num_assistant_tokens]
    plan = [
        (repeat, prompt, gamma)
        for repeat in range(config.repeats)
        for prompt in prompts
        for gamma in gammas
    ]
    due = [(r, p, g) for r, p, g in plan if label(path, g, r, p) not in journal]
    if due:
        for gamma in (0, gammas[-1]):  # warm up both ways; not kept
            decode(prompts[0], gamma)
    with Progress(f"bench {path}", len(plan), "answers", done=len(plan) - len(due)) as progress:
        for repeat, prompt, gamma in due:
            journal.add(label(path, gamma, repeat, prompt), decode(prompt, gamma))
            progress.advance(1)


def summarize(
    path: str, prompts: Sequence[EvaluationPrompt], config: BenchConfig, journal: Journal
) -> dict[str, Any]:
    """Return tokens/s, ratio to the target alone and acceptance for every γ, per task and overall.

    ``best`` is the γ with the highest ratio; ``is_speed_up`` says whether the whole interval of
    that ratio lies above 1. The interval is a bootstrap over prompts and repeats; γ was chosen by
    the same runs, so the best ratio is slightly flattering.
    """

    def records(gamma: int, task: str | None) -> list[DecodingRecord]:
        return [
            journal[label(path, gamma, repeat, prompt)]
            for repeat in range(config.repeats)
            for prompt in prompts
            if task in (None, prompt.task)
        ]

    def figures(task: str | None) -> dict[str, Any]:
        alone = records(0, task)
        sweep: dict[str, dict[str, Any]] = {}
        for gamma in config.num_assistant_tokens:
            assisted = records(gamma, task)
            ratio = speed_ratio(assisted, alone)
            sweep[str(gamma)] = {
                "tokens_per_second": tokens_per_second(assisted),
                "ratio": [ratio.value, ratio.low, ratio.high],
                "acceptance_rate": acceptance_rate(assisted),
                "block_efficiency": block_efficiency(assisted),
            }
        best = max(sweep, key=lambda gamma: sweep[gamma]["ratio"][0])
        return {
            "alone_tokens_per_second": tokens_per_second(alone),
            "sweep": sweep,
            "best_num_assistant_tokens": int(best),
            "is_speed_up": sweep[best]["ratio"][1] > 1.0,
        }

    # Greedy answers of one path must agree whatever drafts; int8 kernels may round ties apart.
    differing = sum(
        journal[label(path, gamma, 0, prompt)].tokens != journal[label(path, 0, 0, prompt)].tokens
        for prompt in prompts
        for gamma in config.num_assistant_tokens
    )
    return {
        "prompts": len(prompts),
        "repeats": config.repeats,
        "answers_compared": len(prompts) * len(config.num_assistant_tokens),
        "answers_differing": differing,
        "tasks": {task: figures(task) for task in config.tasks},
        "overall": figures(None),
    }
