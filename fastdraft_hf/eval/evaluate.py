"""Measure a draft on held-out prompts through transformers' ``generate``.

Every prompt is sampled with the draft, at every temperature and γ, and both models read these texts
once more for the expected acceptance (`expected`). Then it is decoded greedily by the target alone
and with the draft, and compared token for token. A few prompts are also sampled with the draft as
it was before training.

Prompts are dealt out to the processes, each of which keeps its answers in a file of its own. The
seed of a sampled answer is that of its prompt, so results do not depend on the number of processes.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from fastdraft_hf import _processes
from fastdraft_hf._progress import Progress
from fastdraft_hf._ties import first_difference, greedy_margin
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.decode.speculative import drafting_of
from fastdraft_hf.draft.families import count_parameters
from fastdraft_hf.eval.config import EvaluateConfig
from fastdraft_hf.eval.expected import Continuation, add_rounds, expected_rounds, text_acceptance
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.metrics import (
    Counts,
    acceptance_by_length,
    acceptance_by_position,
    acceptance_rate,
    block_efficiency,
    bootstrap,
    mbsu,
)
from fastdraft_hf.eval.prompts import EvaluationPrompt

# The kinds of runs of one prompt.
ALONE, GREEDY, SAMPLED, UNTRAINED = "alone", "greedy", "sampled", "untrained"
RECORDS = "records.jsonl"


@dataclass(frozen=True)
class Setting:
    """One way of decoding every prompt: which run, with which γ, at which temperature."""

    run: str
    num_assistant_tokens: int = 0
    temperature: float = 0.0

    def label(self, prompt: EvaluationPrompt) -> str:
        """Return the journal's key of an answer, which starts with the run."""
        way = f"{self.run}/{self.num_assistant_tokens}/{self.temperature!r}"
        return f"{way}/{prompt.task}/{prompt.key}"


TARGET_ALONE = Setting(ALONE)


def settings_of(config: EvaluateConfig) -> list[Setting]:
    """Return the settings with the draft in the order of the results: sampled, then greedy."""
    sampled = [Setting(SAMPLED, g, t) for t in config.sampled for g in config.gammas]
    return sampled + [Setting(GREEDY, g) for g in config.greedy_gammas]


def _untrained(config: EvaluateConfig) -> Setting:
    return Setting(UNTRAINED, config.gammas[0], config.sampled[0])


def evaluate(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    folder: Path,
    *,
    seed: int,
    untrained: PreTrainedModel | None = None,
) -> dict[str, Any] | None:
    """Measure a draft; several processes share the prompts.

    Args:
        target, draft: the pair to measure, on one device.
        prompts: from `draw_prompts`, the same in every process.
        folder: keeps the answers (``records.jsonl``); what it holds is not measured again.
        seed: of the sampling; each prompt adds its number.
        untrained: the draft before training; ``None`` leaves its runs out.

    Returns:
        the content of ``results.json`` on the main process, ``None`` on the others.
    """
    plan = _plan(prompts, config, untrained is not None)
    journal = _journal(folder)
    _processes.barrier()  # every process has read what there is before one writes
    drafts = {ALONE: None, GREEDY: draft, SAMPLED: draft, UNTRAINED: untrained}
    _measure(target, drafts, plan, config, journal, seed)
    _processes.barrier()
    if not _processes.is_main():
        return None
    journal = _journal(folder)
    # A time limit leaves runs out, the last ones of each process.
    complete = [runs for runs in plan if all(label in journal for label in runs.settings)]
    journal.write(folder / RECORDS, itertools.chain(*(runs.settings for runs in complete)))
    for part in folder.glob("records-*.jsonl"):
        part.unlink()
    journal = _journal(folder)  # without the runs that are not complete
    sampled, greedy = ([r.prompt for r in complete if r.sampled is kind] for kind in (True, False))
    sizes = target.num_parameters(), count_parameters(draft.config)  # with the full head
    return {
        "target_parameters": sizes[0],
        "draft_parameters": sizes[1],
        "cost_ratio": sizes[1] / sizes[0],
        **summarize(sampled, journal, config, sizes[1] / sizes[0]),
        **compare_greedy(target, greedy, config, journal),
        "prompts": {"drawn": len(prompts), "measured": len(sampled)},
    }


def _journal(folder: Path) -> Journal:
    """Open this process's journal; it knows the answers of all processes and starts."""
    own = folder / f"records-{_processes.rank()}.jsonl"
    return Journal(own, sorted(folder.glob("records*.jsonl")))


class _Runs(NamedTuple):
    """Runs of one prompt, which a time limit leaves out together: the sampled ones or the others.

    ``number`` is the prompt's; ``settings`` are by label, the target alone before greedy ones.
    """

    number: int
    prompt: EvaluationPrompt
    sampled: bool
    settings: dict[str, Setting]


def _plan(
    prompts: Sequence[EvaluationPrompt], config: EvaluateConfig, untrained: bool
) -> list[_Runs]:
    """Return the runs in their order: the first prompt's, all other sampled ones, and the rest.

    Sampled ones tell most about a draft, and a slow target has time for few.
    """
    settings = settings_of(config)
    sampled = [one for one in settings if one.run == SAMPLED]
    greedy = [TARGET_ALONE, *(one for one in settings if one.run == GREEDY)]
    plan, seen = [], Counter[str]()
    for number, prompt in enumerate(prompts):
        more = untrained and seen[prompt.task] < config.untrained_prompts_per_task
        seen[prompt.task] += 1
        others = [*greedy, _untrained(config)] if more else greedy
        for chosen in (sampled, others):
            labels = {setting.label(prompt): setting for setting in chosen}
            plan.append(_Runs(number, prompt, chosen is sampled, labels))
    return sorted(plan, key=lambda runs: (runs.number > 0, not runs.sampled))


def _measure(
    target: PreTrainedModel,
    drafts: Mapping[str, Any],
    plan: list[_Runs],
    config: EvaluateConfig,
    journal: Journal,
    seed: int,
) -> None:
    """Decode and read this process's share of the prompts, as far as the journal lacks them."""
    ends = target.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]

    def answer(setting: Setting, prompt: EvaluationPrompt, seed: int, tokens: int) -> Any:
        return decode(
            target,
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=tokens,
            seed=seed,
            draft=drafts[setting.run],
            path=config.path,
            temperature=setting.temperature,
            num_assistant_tokens=setting.num_assistant_tokens,
        )

    due = []
    for runs in plan:
        missing = {label: one for label, one in runs.settings.items() if label not in journal}
        if missing and runs.number % _processes.world() == _processes.rank():
            due.append(runs._replace(settings=missing))
    if due:  # the first calls of a process are slow (threads, allocator) and not kept
        for setting in (TARGET_ALONE, Setting(GREEDY, config.gammas[0])):
            answer(setting, EvaluationPrompt("warm-up", "", plan[0].prompt.ids), seed, 8)
    ratio = drafting_of(drafts[SAMPLED]).temperature_ratio if config.path == "ours" else 1.0
    end, took = time.monotonic() + 60 * (config.max_minutes or math.inf), 0.0
    with Progress("evaluate", sum(len(runs.settings) for runs in due), "answers") as progress:
        for number, prompt, _, settings in due:
            began = time.monotonic()
            if began + took > end and number:  # the first prompt is always measured
                break
            for label, setting in settings.items():
                record = answer(setting, prompt, seed + number, config.max_new_tokens)
                reading = None
                if setting.run == SAMPLED:
                    text = Continuation(prompt.task, prompt.ids, tuple(record.tokens))
                    pair = target, drafts[SAMPLED]
                    reading = text_acceptance(*pair, text, setting.temperature, ends, ratio)
                journal.add(label, record, reading)
                progress.advance(1)
            took = max(took, time.monotonic() - began)


def compare_greedy(
    target: PreTrainedModel,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    records: Mapping[str, DecodingRecord],
) -> dict[str, Any]:
    """Return on how many prompts greedy tokens are the same with the draft, and where not and why.

    ``greedy_differences`` has an entry for each prompt that differs: γ, the first position, the
    target's margin there in logits, and whether it is a near-tie (``tie``). If one answer is a
    prefix of the other the position is ``None``. Of several γ, the first fault is kept, else a tie.
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
    return {
        "greedy_prompts": len(prompts),
        "greedy_identical": len(prompts) - len(differences),
        "greedy_differences": differences,
    }


def summarize(
    prompts: Sequence[EvaluationPrompt], journal: Journal, config: EvaluateConfig, cost_ratio: float
) -> dict[str, Any]:
    """Return the acceptance of an evaluation as a mapping that JSON can hold.

    ``tasks`` and ``overall`` hold the results at the first γ and the first temperature;
    ``settings`` holds one entry for each γ and temperature, with ``tasks`` and ``overall`` of its
    own. Sampled results have a part ``expected``.
    """
    tasks = list(dict.fromkeys(prompt.task for prompt in prompts))

    def measured(setting: Setting, task: str | None) -> dict[str, Any] | None:
        chosen = [p for p in prompts if task in (None, p.task) and setting.label(p) in journal]
        if not chosen:
            return None
        gamma, records = setting.num_assistant_tokens, [journal[setting.label(p)] for p in chosen]
        found: dict[str, Any] = {
            "prompts": len(records),
            **_intervals(records, cost_ratio, gamma),
            "acceptance_by_position": acceptance_by_position(records),
            "acceptance_by_length": acceptance_by_length(records, [len(p.ids) for p in chosen]),
        }
        if setting.run == UNTRAINED:
            after = [journal[first[0].label(p)] for p in chosen]
            pairs = list(zip(after, records, strict=True))
            found["gain"] = bootstrap(pairs, _gain)
        if setting.run != SAMPLED:
            return found
        # Decoding with the draft samples from the target's own distribution, whatever γ is, so the
        # texts of all γ serve every γ. The bootstrap draws prompts with all their texts.
        same = [Setting(SAMPLED, g, setting.temperature) for g in config.gammas]
        texts = [[journal.readings[one.label(p)] for one in same] for p in chosen]
        parts = [
            add_rounds([expected_rounds(text, gamma, config.max_new_tokens) for text in one])
            for one in texts
        ]
        return {**found, "expected": _intervals(parts, cost_ratio, gamma)}

    gamma, temperature = config.gammas[0], config.sampled[0]
    first = [Setting(SAMPLED, gamma, temperature), Setting(GREEDY, gamma), _untrained(config)]
    settings = settings_of(config)
    everything = {
        setting: {task: measured(setting, task) for task in (*tasks, None)}
        for setting in dict.fromkeys([*settings, *first])
    }

    def single(task: str | None) -> dict[str, Any]:
        return {s.run: found for s in first if (found := everything[s][task]) is not None}

    return {
        "num_assistant_tokens": gamma,
        "temperature": temperature,
        "tasks": {task: single(task) for task in tasks},
        "overall": single(None),
        "settings": [
            {
                "num_assistant_tokens": setting.num_assistant_tokens,
                "temperature": setting.temperature,
                "tasks": {task: everything[setting][task] for task in tasks},
                "overall": everything[setting][None],
            }
            for setting in settings
        ],
    }


def _gain(pairs: Sequence[tuple[DecodingRecord, DecodingRecord]]) -> float:
    after, before = zip(*pairs, strict=True)
    return acceptance_rate(after) - acceptance_rate(before)


def _intervals(
    answers: Sequence[Counts], cost_ratio: float, num_assistant_tokens: int
) -> dict[str, Sequence[float]]:
    efficiency = bootstrap(answers, block_efficiency)
    return {
        "acceptance_rate": bootstrap(answers, acceptance_rate),
        "block_efficiency": efficiency,
        "mbsu": [mbsu(value, cost_ratio, num_assistant_tokens) for value in efficiency],
    }
