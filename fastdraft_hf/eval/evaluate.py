"""Measures a draft on held-out prompts through transformers' ``generate``.

Every prompt is decoded greedily by the target alone and with the draft, in turn, so that the two
can be compared token for token and second for second; then with sampling, with the draft only, at
every temperature and γ. The sampled texts are the target's own in distribution, so both models
read them once more and say what acceptance was to be expected (`expected`). A few prompts also run
with the draft as it was before training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._progress import Progress
from fastdraft_hf._sequences import first_difference
from fastdraft_hf._ties import greedy_margin
from fastdraft_hf.decode.assisted import decode
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.config import EvaluateConfig
from fastdraft_hf.eval.expected import (
    Continuation,
    ExpectedRounds,
    TextAcceptance,
    add_rounds,
    expected_rounds,
    rounds_acceptance_rate,
    rounds_block_efficiency,
    rounds_by_position,
    text_acceptance,
)
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.metrics import (
    acceptance_by_position,
    acceptance_rate,
    block_efficiency,
    bootstrap,
    mbsu,
    paired_ratio,
    tokens_per_second,
)
from fastdraft_hf.eval.prompts import EvaluationPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The kinds of runs of one prompt. Greedy alone and assisted stand side by side, so that a drift of
# the machine's speed falls on both.
ALONE, GREEDY, SAMPLED, UNTRAINED = "alone", "greedy", "sampled", "untrained"

# What both models say along the sampled texts of a prompt, by temperature and prompt.
Readings = Mapping[tuple[float, EvaluationPrompt], Sequence[TextAcceptance]]


@dataclass(frozen=True)
class Setting:
    """One way of decoding every prompt: which run, with which γ, at which temperature."""

    run: str
    num_assistant_tokens: int = 0
    temperature: float = 0.0

    def label(self, prompt: EvaluationPrompt) -> str:
        return f"{self.prefix(prompt.task)}{prompt.key}"

    def prefix(self, task: str) -> str:
        """Return what the labels of a task's records begin with."""
        return f"{self.run}/{self.num_assistant_tokens}/{self.temperature!r}/{task}/"


TARGET_ALONE = Setting(ALONE)


def settings_of(config: EvaluateConfig) -> list[Setting]:
    """Return the settings with the draft in the order of the results: sampled ones, then greedy."""
    sampled = [Setting(SAMPLED, g, t) for t in config.sampled for g in config.gammas]
    return sampled + [Setting(GREEDY, g) for g in config.greedy_gammas]


def _untrained(config: EvaluateConfig) -> Setting:
    return Setting(UNTRAINED, config.gammas[0], config.sampled[0])


def collect(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    untrained: PreTrainedModel | None,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    journal: Journal,
    seed: int,
) -> None:
    """Decode every prompt in every setting that the journal does not hold yet.

    Args:
        target, draft: the pair to measure.
        untrained: the draft before training; ``None`` leaves its runs out.
        prompts: as drawn; the first few of each task run with ``untrained``.
        config: lengths, γ and temperatures.
        journal: where records go.
        seed: of the sampling; every prompt adds its place to it.
    """
    firsts = set()
    for task in config.tasks:
        firsts |= set([p for p in prompts if p.task == task][: config.untrained_prompts_per_task])
    settings = settings_of(config)
    order = [TARGET_ALONE, *(s for s in settings if s.run == GREEDY)]
    order += [s for s in settings if s.run == SAMPLED]
    plan: list[tuple[Setting, EvaluationPrompt, PreTrainedModel | None, int]] = []
    for number, prompt in enumerate(prompts):
        for setting in order:
            own_seed = seed + number if setting.run == SAMPLED else seed
            plan.append((setting, prompt, None if setting.run == ALONE else draft, own_seed))
        if untrained is not None and prompt in firsts:
            plan.append((_untrained(config), prompt, untrained, seed + number))
    due = [step for step in plan if step[0].label(step[1]) not in journal]
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
                num_assistant_tokens=config.gammas[0],
                path=config.path,
            )
    with Progress("evaluate", len(plan), "answers", done=len(plan) - len(due)) as progress:
        for setting, prompt, model, run_seed in due:
            record = decode(
                target,
                prompt.ids,
                task=prompt.task,
                key=prompt.key,
                max_new_tokens=config.max_new_tokens,
                temperature=setting.temperature,
                seed=run_seed,
                draft=model,
                num_assistant_tokens=setting.num_assistant_tokens,
                path=config.path,
            )
            journal.add(setting.label(prompt), record)
            progress.advance(1)


def read_texts(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    journal: Journal,
    ends: Collection[int],
) -> Readings:
    """Let both models read every sampled text, for the teacher-forced estimate.

    Decoding with the draft samples from the target's own distribution, whatever γ is, so the texts
    of all γ serve every γ. Nothing is decoded again, and no draft chose what is in them.

    Args:
        target, draft: the pair.
        prompts, config, journal: as they were decoded.
        ends: the target's end tokens.
    """
    sampled = [s for s in settings_of(config) if s.run == SAMPLED]
    found: dict[tuple[float, EvaluationPrompt], list[TextAcceptance]] = {}
    with Progress("read the texts", len(sampled) * len(prompts), "texts") as progress:
        for setting in sampled:
            for prompt in prompts:
                tokens = tuple(journal[setting.label(prompt)].tokens)
                read = found.setdefault((setting.temperature, prompt), [])
                if tokens:
                    text = Continuation(prompt.task, prompt.ids, tokens)
                    read.append(text_acceptance(target, draft, text, setting.temperature, ends))
                progress.advance(1)
    return found


def compare_greedy(
    target: PreTrainedModel,
    prompts: Sequence[EvaluationPrompt],
    config: EvaluateConfig,
    journal: Journal,
) -> list[dict[str, Any]]:
    """Return the prompts whose greedy tokens differ with the draft, and why.

    Each entry names the prompt, γ, the first differing place, the target's margin there in logits,
    and whether that margin explains it (``tie``). A prompt that differs at several γ has one entry,
    of the first fault, else of the first tie.
    """
    differences: list[dict[str, Any]] = []
    for prompt in prompts:
        alone = journal[TARGET_ALONE.label(prompt)].tokens
        found = []
        for gamma in config.greedy_gammas:
            assisted = journal[Setting(GREEDY, gamma).label(prompt)].tokens
            if alone != assisted:
                where = {"task": prompt.task, "key": prompt.key, "num_assistant_tokens": gamma}
                found.append({**where, **explain_difference(target, prompt, alone, assisted)})
        differences += sorted(found, key=lambda entry: bool(entry["tie"]))[:1]
    return differences


def explain_difference(
    target: PreTrainedModel, prompt: EvaluationPrompt, alone: list[int], assisted: list[int]
) -> dict[str, Any]:
    """Return where two unequal greedy answers part, the target's margin there, and if it is a tie.

    Where one is the other's beginning, ``place`` is ``None``: no tie explains that.
    """
    place = first_difference(alone, assisted)
    if place is None or place == min(len(alone), len(assisted)):
        return {"place": None, "tie": False}
    margin = greedy_margin(target, (*prompt.ids, *alone[:place]))
    return {"place": place, "margin": margin.margin, "tie": margin.tie}


def summarize(
    prompts: Sequence[EvaluationPrompt],
    journal: Journal,
    config: EvaluateConfig,
    *,
    target_parameters: int,
    draft_parameters: int,
    differences: list[dict[str, Any]],
    readings: Readings | None = None,
) -> dict[str, Any]:
    """Return the figures of an evaluation as one JSON-ready mapping.

    ``tasks`` and ``overall`` hold the figures of the first γ and the first temperature;
    ``settings`` holds one entry for each γ and temperature, with ``tasks`` and ``overall`` of its
    own. Sampled figures have an ``expected`` part where ``readings`` (`read_texts`) are given.
    """
    ratio = draft_parameters / target_parameters

    def of(task: str | None) -> list[EvaluationPrompt]:
        return [p for p in prompts if task in (None, p.task)]

    def measured(setting: Setting, task: str | None) -> dict[str, Any] | None:
        labels = [(p, setting.label(p)) for p in of(task)]
        taken = [journal[label] for _, label in labels if label in journal]
        if not taken:
            return None
        found = _decoded(taken, ratio, setting.num_assistant_tokens)
        if readings is not None and setting.run == SAMPLED:
            found["expected"] = _expected(
                [readings[setting.temperature, prompt] for prompt in of(task)],
                ratio,
                setting.num_assistant_tokens,
                config.max_new_tokens,
            )
            found["intervals_overlap"] = _overlap(
                found["acceptance_rate"], found["expected"]["acceptance_rate"]
            )
        return found

    def figures(task: str | None) -> dict[str, Any]:
        first = {
            SAMPLED: Setting(SAMPLED, config.gammas[0], config.sampled[0]),
            GREEDY: Setting(GREEDY, config.gammas[0]),
            UNTRAINED: _untrained(config),
        }
        result: dict[str, Any] = {}
        for run, setting in first.items():
            found = measured(setting, task)
            if found is not None:
                result[run] = found
        alone = [journal[TARGET_ALONE.label(p)] for p in of(task)]
        assisted = [journal[first[GREEDY].label(p)] for p in of(task)]
        result["greedy_wall_clock"] = {
            "alone_tokens_per_second": tokens_per_second(alone),
            "assisted_tokens_per_second": tokens_per_second(assisted),
            "ratio": paired_ratio(list(zip(assisted, alone, strict=True))).triple(),
        }
        return result

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
        "tasks": {task: figures(task) for task in config.tasks},
        "overall": figures(None),
        "settings": [
            {
                "num_assistant_tokens": setting.num_assistant_tokens,
                "temperature": setting.temperature,
                "tasks": {task: measured(setting, task) for task in config.tasks},
                "overall": measured(setting, None),
            }
            for setting in settings_of(config)
        ],
    }


def _decoded(taken: list[DecodingRecord], ratio: float, gamma: int) -> dict[str, Any]:
    efficiency = bootstrap(taken, block_efficiency).triple()
    return {
        "prompts": len(taken),
        "drafted": sum(r.drafted for r in taken),
        "acceptance_rate": bootstrap(taken, acceptance_rate).triple(),
        "block_efficiency": efficiency,
        "mbsu": [mbsu(v, ratio, gamma) for v in efficiency],
        "acceptance_by_position": acceptance_by_position(taken),
    }


def _expected(
    texts: Sequence[Sequence[TextAcceptance]], ratio: float, gamma: int, max_new_tokens: int
) -> dict[str, Any]:
    # A prompt is what the interval draws, with all its texts: they are not independent of it.
    parts: list[ExpectedRounds] = [
        add_rounds([expected_rounds(text, gamma, max_new_tokens) for text in of_prompt])
        for of_prompt in texts
        if of_prompt
    ]
    efficiency = bootstrap(parts, rounds_block_efficiency).triple()
    return {
        "texts": sum(map(len, texts)),
        "acceptance_rate": bootstrap(parts, rounds_acceptance_rate).triple(),
        "block_efficiency": efficiency,
        "mbsu": [mbsu(v, ratio, gamma) for v in efficiency],
        "acceptance_by_position": rounds_by_position(parts),
    }


def _overlap(one: list[float], other: list[float]) -> bool:
    """Return whether two [value, low, high] share a value."""
    return one[1] <= other[2] and other[1] <= one[2]


def save_path(folder: Path) -> Path:
    """Return where an evaluation keeps its records."""
    return folder / "records.jsonl"
