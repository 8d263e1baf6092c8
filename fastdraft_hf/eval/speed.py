"""What the timings of a benchmark say: ratios over pairs, the best setting, and a verdict on it."""

from __future__ import annotations

import itertools
import math
import operator
import random
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.bench import RUNTIMES, Setting
from fastdraft_hf.eval.config import BenchConfig
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.metrics import (
    Estimate,
    Pair,
    Row,
    acceptance_rate,
    block_efficiency,
    paired_ratio,
    ratio_of_rows,
    rows_by_prompt,
    tokens_per_second,
)
from fastdraft_hf.eval.prompts import EvaluationPrompt

Prompt = tuple[str, str]

HALVES, SAME_RUNS = "other half of the prompts", "same runs"
# Halvings of the prompts: all of them up to eight prompts, else this many at random.
_MOST_HALVINGS = 70


@dataclass(frozen=True)
class Judgement:
    """A setting that was chosen, and the speed of choosing like that.

    Attributes:
        best: the fastest setting over all prompts.
        ratio: of what was chosen to the target alone.
        judged_on: `HALVES`, or `SAME_RUNS` when there is only one prompt or one setting.
        pairs: timings behind the ratio.
    """

    best: Setting
    ratio: Estimate
    judged_on: str
    pairs: int

    @property
    def is_speed_up(self) -> bool:
        # One pair has no spread, so nothing can be told apart from chance.
        return self.pairs > 1 and self.ratio.low > 1.0

    def to_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio.triple(), "judged_on": self.judged_on, "pairs": self.pairs}


def judge(candidates: Mapping[Setting, Sequence[Pair]]) -> Judgement:
    """Choose the fastest setting and say how fast such a choice is on prompts it has not seen.

    The best of several settings on some runs is partly the luckiest one, so its ratio on those
    runs is too high. Here the setting is chosen on one half of the prompts and judged on the
    other, and this is averaged over many ways of halving them: with four or eight prompts, the
    outcome of a single halving is a lottery. A prompt's repeats stay together, since they accept
    the same tokens. What is judged is a choice made from half the prompts, so where settings are
    nearly level the figure is a little low, and it may lie below every single setting's ratio.

    Simulated with five settings of equal speed, prompts that differ by 10% and settings that
    differ by 15% from prompt to prompt: the ratio of the best on its own runs is 0.09 too high
    with four prompts and 0.06 with eight; judged like this it is right to 0.01, as it is when
    each prompt is judged by the choice of all the others, which scatters by a third more.

    Args:
        candidates: each setting's pairs (setting, target alone), the same prompts in all.
    """
    rows = {setting: rows_by_prompt(pairs) for setting, pairs in candidates.items()}
    prompts = list(next(iter(rows.values())))

    def fastest(on: Collection[Prompt]) -> Setting:
        def speed(setting: Setting) -> float:
            chosen = [row for key in on for row in rows[setting][key]]
            return sum(row[0] for row in chosen) / max(sum(row[1] for row in chosen), 1e-12)

        return max(rows, key=speed)

    best = fastest(prompts)
    count = len(candidates[best])
    if len(prompts) < 2 or len(rows) < 2:
        return Judgement(best, paired_ratio(candidates[best]), SAME_RUNS, count)
    chosen: dict[Prompt, Counter[Setting]] = {key: Counter() for key in prompts}
    for half in _halves(prompts):
        setting = fastest(half)
        for key in prompts:
            if key not in half:
                chosen[key][setting] += 1
    judged = {}
    for key, counts in chosen.items():
        # Repeat by repeat, so that both sides of a row were timed together.
        together = zip(*(rows[setting][key] for setting in counts), strict=True)
        judged[key] = [_mean(repeat, list(counts.values())) for repeat in together]
    return Judgement(best, ratio_of_rows(judged), HALVES, count)


def _halves(prompts: Sequence[Prompt]) -> list[set[Prompt]]:
    """Return the halves to choose on; the rest of the prompts is the half to judge on."""
    size = len(prompts) // 2
    if math.comb(len(prompts), size) <= _MOST_HALVINGS:
        halves = [set(half) for half in itertools.combinations(prompts, size)]
    else:
        rng = random.Random(0)
        halves = [set(rng.sample(list(prompts), size)) for _ in range(_MOST_HALVINGS // 2)]
    everything = set(prompts)
    # Both ways, so that every prompt is judged, and as often as any other where that is possible.
    return halves + [everything - half for half in halves]


def _mean(rows: Sequence[Row], weights: Sequence[int]) -> Row:
    total = sum(weights)
    columns = zip(*rows, strict=True)
    a, b, c, d = (sum(map(operator.mul, column, weights)) / total for column in columns)
    return a, b, c, d


class Timings:
    """The journal of a benchmark, asked by setting."""

    def __init__(
        self, journal: Journal, prompts: Sequence[EvaluationPrompt], config: BenchConfig
    ) -> None:
        self._journal, self._prompts, self._repeats = journal, prompts, config.repeats

    def records(self, setting: Setting, task: str | None = None) -> list[DecodingRecord]:
        """Return a setting's records of a task set, or of all, in the same order every time."""
        return [
            self._journal[setting.label(repeat, prompt)]
            for repeat in range(self._repeats)
            for prompt in self._prompts
            if task in (None, prompt.task)
        ]

    def pairs(self, setting: Setting, other: Setting, task: str | None = None) -> list[Pair]:
        return list(zip(self.records(setting, task), self.records(other, task), strict=True))


def summarize(
    timings: Timings,
    assisted: Sequence[Setting],
    prompts: Sequence[EvaluationPrompt],
    config: BenchConfig,
) -> dict[str, Any]:
    """Return ``paths``, ``best`` and ``comparisons`` of ``results.json``.

    Args:
        timings: what was timed.
        assisted: the settings that draft.
        prompts, config: of the benchmark.
    """
    ways: dict[str, list[Setting]] = {}
    for setting in assisted:
        ways.setdefault(setting.name, []).append(setting)
    paths = {}
    for name, settings in ways.items():
        tasks = {task: _figures(timings, settings, task) for task in config.tasks}
        differing = sum(
            a.tokens != b.tokens
            for setting in settings
            for a, b in timings.pairs(setting, setting.baseline)[: len(prompts)]
        )
        paths[name] = {
            "path": settings[0].path,
            "draft": settings[0].draft,
            "prompts": len(prompts),
            "repeats": config.repeats,
            # Greedy answers of one path must agree whatever drafts; int8 may round ties apart.
            "answers_compared": len(prompts) * len(settings),
            "answers_differing": differing,
            "tasks": tasks,
            "overall": _figures(timings, settings, None),
        }
    results: dict[str, Any] = {"paths": paths}
    if assisted:
        results["best"] = _best(timings, assisted)
        results["comparisons"] = _comparisons(timings, ways, paths)
    return results


def _speed(records: Sequence[DecodingRecord]) -> dict[str, Any]:
    firsts = [r.first_token_seconds for r in records if r.first_token_seconds is not None]
    return {
        "tokens_per_second": tokens_per_second(records),
        "first_token_seconds": statistics.median(firsts) if firsts else None,
    }


def _figures(timings: Timings, settings: Sequence[Setting], task: str | None) -> dict[str, Any]:
    """Return one path's figures on a task set, or on all of them."""
    pairs = {s: timings.pairs(s, s.baseline, task) for s in settings}
    sweep: dict[str, dict[str, Any]] = {}
    for setting in settings:
        records = timings.records(setting, task)
        told = any(r.drafted for r in records)  # GenAI's prompt lookup does not tell
        sweep[str(setting.num_assistant_tokens)] = {
            **_speed(records),
            "ratio": paired_ratio(pairs[setting]).triple(),
            "acceptance_rate": acceptance_rate(records) if told else None,
            "block_efficiency": block_efficiency(records),
        }
    judgement = judge(pairs)
    alone = _speed(timings.records(settings[0].baseline, task))
    figures = {
        **{f"alone_{key}": value for key, value in alone.items()},
        "sweep": sweep,
        "best_num_assistant_tokens": judgement.best.num_assistant_tokens,
        "judged": judgement.to_dict(),
        "is_speed_up": judgement.is_speed_up,
    }
    plain = settings[0].without_draft
    if plain is not None:
        # What of the ratio is our loop's (and its linear layers') and what is the draft's.
        figures["without_draft"] = {
            **_speed(timings.records(plain, task)),
            "ratio": paired_ratio(timings.pairs(plain, plain.baseline, task)).triple(),
            "best_over_this": paired_ratio(timings.pairs(judgement.best, plain, task)).triple(),
        }
    return figures


def _best(timings: Timings, assisted: Sequence[Setting]) -> dict[str, Any]:
    """Return the fastest setting of all, judged, and the fastest engine for the target alone.

    Tokens/s decide, since that is what a user waits for; weights of different formats meet here
    (float32 through PyTorch, int8 through OpenVINO).
    """
    judgement = judge({s: timings.pairs(s, s.baseline) for s in assisted})
    best = judgement.best
    alone = {s.baseline: timings.records(s.baseline) for s in assisted}
    engine = max(alone, key=lambda setting: tokens_per_second(alone[setting]))
    return {
        "path": best.path,
        "draft": best.draft,
        "num_assistant_tokens": best.num_assistant_tokens,
        **_speed(timings.records(best)),
        "judged": judgement.to_dict(),
        "is_speed_up": judgement.is_speed_up,
        "fastest_alone": {
            "engine": engine.path,
            "tokens_per_second": tokens_per_second(alone[engine]),
        },
    }


def _comparisons(
    timings: Timings, ways: Mapping[str, Sequence[Setting]], paths: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return how fast one path is over another, for all of a runtime, each at its own best γ."""
    found = []
    for (first, ours), (second, theirs) in itertools.combinations(ways.items(), 2):
        if not any(ours[0].path in r and theirs[0].path in r for r in RUNTIMES.values()):
            continue  # timed one after the other: no pairs
        if ours[0].path != theirs[0].path and ours[0].draft != theirs[0].draft:
            continue  # two things differ, so the ratio says nothing about either
        chosen = [
            next(
                s
                for s in settings
                if s.num_assistant_tokens == paths[name]["overall"]["best_num_assistant_tokens"]
            )
            for name, settings in ((first, ours), (second, theirs))
        ]
        found.append(
            {
                "path": second,
                "num_assistant_tokens": chosen[1].num_assistant_tokens,
                "over": first,
                "over_num_assistant_tokens": chosen[0].num_assistant_tokens,
                "ratio": paired_ratio(timings.pairs(chosen[1], chosen[0])).triple(),
            }
        )
    return found
