"""Measure a draft on held-out prompts through transformers' ``generate``.

Every prompt is decoded greedily by the target alone and with the draft, and compared token for
token; then sampled with the draft, at every temperature and γ. Both models read the sampled texts
once more for the expected acceptance (`expected`). A few prompts are also sampled with the draft as
it was before training.

Prompts are dealt out to the processes, each of which keeps its results in files of its own. The
seed of a sampled answer is that of its prompt, so results do not depend on the number of processes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf import _processes
from fastdraft_hf._progress import Progress
from fastdraft_hf._sequences import first_difference
from fastdraft_hf._ties import greedy_margin
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.decode.speculative import drafting_of
from fastdraft_hf.eval.config import EvaluateConfig
from fastdraft_hf.eval.expected import (
    Continuation,
    TextAcceptance,
    add_rounds,
    expected_rounds,
    rounds_by_position,
    text_acceptance,
)
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.metrics import (
    Counts,
    acceptance_by_position,
    acceptance_rate,
    block_efficiency,
    bootstrap,
    mbsu,
)
from fastdraft_hf.eval.prompts import EvaluationPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The kinds of runs of one prompt.
ALONE, GREEDY, SAMPLED, UNTRAINED = "alone", "greedy", "sampled", "untrained"
RECORDS, READINGS = "records.jsonl", "readings.jsonl"

Records = Mapping[str, DecodingRecord]
Readings = Mapping[str, TextAcceptance]


@dataclass(frozen=True)
class Setting:
    """One way of decoding every prompt: which run, with which γ, at which temperature."""

    run: str
    num_assistant_tokens: int = 0
    temperature: float = 0.0

    def label(self, prompt: EvaluationPrompt) -> str:
        return f"{self.prefix(prompt.task)}{prompt.key}"

    def prefix(self, task: str) -> str:
        """Return the beginning of the labels of a task set's records."""
        return f"{self.run}/{self.num_assistant_tokens}/{self.temperature!r}/{task}/"


TARGET_ALONE = Setting(ALONE)


def settings_of(config: EvaluateConfig) -> list[Setting]:
    """Return the settings with the draft in the order of the results: sampled, then greedy."""
    sampled = [Setting(SAMPLED, g, t) for t in config.sampled for g in config.gammas]
    return sampled + [Setting(GREEDY, g) for g in config.greedy_gammas]


def _untrained(config: EvaluateConfig) -> Setting:
    return Setting(UNTRAINED, config.gammas[0], config.sampled[0])


@dataclass(frozen=True)
class Models:
    """The models of an evaluation.

    Attributes:
        target, draft: the pair to measure, on one device.
        untrained: the draft before training; ``None`` leaves its runs out.
        stop_ids: the target's end tokens.
    """

    target: PreTrainedModel
    draft: PreTrainedModel
    untrained: PreTrainedModel | None = None
    stop_ids: Collection[int] = ()


def evaluate(
    models: Models,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    folder: Path,
    *,
    seed: int,
    target_parameters: int,
    draft_parameters: int,
) -> dict[str, Any] | None:
    """Measure a draft; several processes share the prompts.

    Args:
        models: the target and the draft.
        prompts: from `draw_prompts`, the same in every process.
        config: lengths, γ, temperatures and time limit.
        folder: keeps the answers (``records.jsonl``) and their expected acceptance
            (``readings.jsonl``); what it holds is not measured again.
        seed: of the sampling; each prompt adds its number.
        target_parameters, draft_parameters: for the cost ratio c.

    Returns:
        the content of ``results.json`` on the main process, ``None`` on the others.
    """
    records, readings = _journals(folder)
    _processes.barrier()  # every process has read what there is before one writes
    _measure(models, prompts, config, records, readings, seed)
    _processes.barrier()
    if not _processes.is_main():
        return None
    records, readings = _journals(folder)
    steps = [_steps(prompt, prompts, config, models.untrained is not None) for prompt in prompts]
    # A time limit leaves prompts out, the last ones of each process.
    complete = [all(label in records for label in one) for one in steps]
    measured = list(itertools.compress(prompts, complete))
    texts = [[label for label in one if label in readings] for one in steps]
    records.write(folder / RECORDS, itertools.chain(*itertools.compress(steps, complete)))
    readings.write(folder / READINGS, itertools.chain(*itertools.compress(texts, complete)))
    for part in (*folder.glob("records-*.jsonl"), *folder.glob("readings-*.jsonl")):
        part.unlink()
    results = summarize(
        measured,
        records,
        readings,
        config,
        target_parameters=target_parameters,
        draft_parameters=draft_parameters,
        differences=compare_greedy(models.target, measured, config, records),
    )
    return {**results, "prompts": {"drawn": len(prompts), "measured": len(measured)}}


def _journals(folder: Path) -> tuple[Journal[DecodingRecord], Journal[TextAcceptance]]:
    """Open this process's journals; they know the results of all processes and starts."""

    def opened(name: str, read: Callable[[dict[str, Any]], Any]) -> Journal[Any]:
        own = folder / f"{name}-{_processes.rank()}.jsonl"
        return Journal(own, sorted(folder.glob(f"{name}*.jsonl")), read)

    return opened("records", DecodingRecord.from_dict), opened("readings", TextAcceptance.from_dict)


def _steps(
    prompt: EvaluationPrompt,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    untrained: bool,
) -> dict[str, Setting]:
    """Return the runs of a prompt by label: greedy ones first, the target alone before them."""
    settings = [TARGET_ALONE, *sorted(settings_of(config), key=lambda s: s.run != GREEDY)]
    firsts = [p for p in prompts if p.task == prompt.task][: config.untrained_prompts_per_task]
    if untrained and prompt in firsts:
        settings.append(_untrained(config))
    return {setting.label(prompt): setting for setting in settings}


def _measure(
    models: Models,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    records: Journal[DecodingRecord],
    readings: Journal[TextAcceptance],
    seed: int,
) -> None:
    """Decode and read this process's share of the prompts, as far as the journals lack them."""
    drafts = {ALONE: None, UNTRAINED: models.untrained}

    def answer(setting: Setting, prompt: EvaluationPrompt, seed: int, tokens: int) -> Any:
        return decode(
            models.target,
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=tokens,
            seed=seed,
            draft=drafts.get(setting.run, models.draft),
            path=config.path,
            temperature=setting.temperature,
            num_assistant_tokens=setting.num_assistant_tokens,
        )

    due = []
    firsts = {prompt.task: prompt for prompt in reversed(prompts)}
    for number, prompt in enumerate(prompts):
        steps = _steps(prompt, prompts, config, models.untrained is not None)
        sampled = [label for label, setting in steps.items() if setting.run == SAMPLED]
        missing = sum(label not in records for label in steps)
        if missing or any(label not in readings for label in sampled):
            due.append((number, prompt, steps, missing))
    due = due[_processes.rank() :: _processes.world()]
    total = sum(missing for _, _, _, missing in due)
    if total:  # the first calls of a process are slow (threads, allocator) and not kept
        for setting in (TARGET_ALONE, Setting(GREEDY, config.gammas[0])):
            answer(setting, EvaluationPrompt("warm-up", "", prompts[0].ids), seed, 8)
    ratio = drafting_of(models.draft).temperature_ratio if config.path == "ours" else 1.0
    end = time.monotonic() + 60 * (config.max_minutes or math.inf)
    with Progress("evaluate", total, "answers") as progress:
        for number, prompt, steps, _ in due:
            if time.monotonic() > end and firsts[prompt.task] != prompt:
                break
            for label, setting in steps.items():
                if label not in records:
                    found = answer(setting, prompt, seed + number, config.max_new_tokens)
                    records.add(label, found)
                    progress.advance(1)
                if setting.run == SAMPLED and label not in readings:
                    text = Continuation(prompt.task, prompt.ids, tuple(records[label].tokens))
                    pair, ends = (models.target, models.draft), models.stop_ids
                    reading = text_acceptance(*pair, text, setting.temperature, ends, ratio)
                    readings.add(label, reading)


def compare_greedy(
    target: PreTrainedModel,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    records: Records,
) -> list[dict[str, Any]]:
    """Return the prompts whose greedy tokens differ with the draft, and why.

    Each entry names the prompt, γ, the first differing position, the target's margin there in
    logits, and whether the margin is a near-tie that rounding explains (``tie``). If one answer is
    a prefix of the other the position is ``None`` and no tie explains it. A prompt that differs at
    several γ has one entry, of the first fault, else of the first tie.
    """
    differences: list[dict[str, Any]] = []
    for prompt in prompts:
        alone = records[TARGET_ALONE.label(prompt)].tokens
        found: list[dict[str, Any]] = []
        for gamma in config.greedy_gammas:
            assisted = records[Setting(GREEDY, gamma).label(prompt)].tokens
            position = first_difference(alone, assisted)
            if position is None:
                continue
            why: dict[str, Any] = {"position": None, "tie": False}
            if position < min(len(alone), len(assisted)):
                margin = greedy_margin(target, (*prompt.ids, *alone[:position]))
                why = {"position": position, "margin": margin.margin, "tie": margin.tie}
            entry = {"task": prompt.task, "key": prompt.key, "num_assistant_tokens": gamma}
            found.append({**entry, **why})
        differences += sorted(found, key=lambda entry: bool(entry["tie"]))[:1]
    return differences


def summarize(
    prompts: Sequence[EvaluationPrompt],
    records: Records,
    readings: Readings,
    config: EvaluateConfig,
    *,
    target_parameters: int,
    draft_parameters: int,
    differences: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the results of an evaluation as a mapping that JSON can hold.

    ``tasks`` and ``overall`` hold the results at the first γ and the first temperature;
    ``settings`` holds one entry for each γ and temperature, with ``tasks`` and ``overall`` of its
    own. Sampled results have a part ``expected``.
    """
    ratio = draft_parameters / target_parameters
    tasks = list(dict.fromkeys(prompt.task for prompt in prompts))

    def measured(setting: Setting, task: str | None) -> dict[str, Any] | None:
        chosen = [p for p in prompts if task in (None, p.task) and setting.label(p) in records]
        if not chosen:
            return None
        gamma, taken = setting.num_assistant_tokens, [records[setting.label(p)] for p in chosen]
        found: dict[str, Any] = {
            "prompts": len(taken),
            "drafted": sum(r.drafted for r in taken),
            **_intervals(taken, ratio, gamma),
            "acceptance_by_position": acceptance_by_position(taken),
        }
        if setting.run != SAMPLED:
            return found
        # Decoding with the draft samples from the target's own distribution, whatever γ is, so the
        # texts of all γ serve every γ. The bootstrap draws prompts with all their texts.
        same = [Setting(SAMPLED, g, setting.temperature) for g in config.gammas]
        parts = [
            add_rounds(
                [expected_rounds(readings[s.label(p)], gamma, config.max_new_tokens) for s in same]
            )
            for p in chosen
        ]
        expected: dict[str, Any] = {
            "texts": len(chosen) * len(same),
            **_intervals(parts, ratio, gamma),
            "acceptance_by_position": rounds_by_position(parts),
        }
        one, other = found["acceptance_rate"], expected["acceptance_rate"]
        overlap = one[1] <= other[2] and other[1] <= one[2]
        return {**found, "expected": expected, "intervals_overlap": overlap}

    def of_all(setting: Setting) -> dict[str | None, Any]:
        return {task: measured(setting, task) for task in (*tasks, None)}

    everything = {setting: of_all(setting) for setting in settings_of(config)}
    first = {
        SAMPLED: everything[Setting(SAMPLED, config.gammas[0], config.sampled[0])],
        GREEDY: everything[Setting(GREEDY, config.gammas[0])],
        UNTRAINED: of_all(_untrained(config)),
    }

    def single(task: str | None) -> dict[str, Any]:
        return {run: found[task] for run, found in first.items() if found[task] is not None}

    return {
        "num_assistant_tokens": config.gammas[0],
        "temperature": config.sampled[0],
        "max_new_tokens": config.max_new_tokens,
        "target_parameters": target_parameters,
        "draft_parameters": draft_parameters,
        "cost_ratio": ratio,
        "greedy_prompts": len(prompts),
        "greedy_identical": len(prompts) - len(differences),
        "greedy_differences": differences,
        "tasks": {task: single(task) for task in tasks},
        "overall": single(None),
        "settings": [
            {
                "num_assistant_tokens": setting.num_assistant_tokens,
                "temperature": setting.temperature,
                "tasks": {task: found[task] for task in tasks},
                "overall": found[None],
            }
            for setting, found in everything.items()
        ],
    }


def _intervals(taken: Sequence[Counts], ratio: float, gamma: int) -> dict[str, list[float]]:
    found = bootstrap(taken, block_efficiency).triple()
    return {
        "acceptance_rate": bootstrap(taken, acceptance_rate).triple(),
        "block_efficiency": found,
        "mbsu": [mbsu(value, ratio, gamma) for value in found],
    }
