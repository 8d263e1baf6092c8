"""Results of a benchmark: ratios over pairs, the best setting, and whether it pays."""

from __future__ import annotations

import gc
import itertools
import math
import operator
import random
import statistics
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval import bench
from fastdraft_hf.eval.bench import Setting
from fastdraft_hf.eval.config import BenchConfig
from fastdraft_hf.eval.engines import Models, load_engine
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
# Ways to halve the prompts: all of them up to eight prompts, else this many at random.
_MOST_HALVINGS = 70


@dataclass(frozen=True)
class Judgement:
    """A setting that was chosen, and the speed-up of choosing in this way.

    Attributes:
        best: the fastest setting over all prompts.
        ratio: of the chosen settings over the target alone.
        judged_on: `HALVES`, or `SAME_RUNS` if there is only one prompt or one setting.
        pairs: timings behind the ratio.
    """

    best: Setting
    ratio: Estimate
    judged_on: str
    pairs: int

    @property
    def is_speed_up(self) -> bool:
        # One pair has no spread, so it cannot be told apart from chance.
        return self.pairs > 1 and self.ratio.low > 1.0

    def to_dict(self) -> dict[str, Any]:
        judged = {"judged_on": self.judged_on, "pairs": self.pairs}
        return {
            "judged": {"ratio": self.ratio.triple(), **judged},
            "is_speed_up": self.is_speed_up,
        }


def judge(candidates: Mapping[Setting, Sequence[Pair]]) -> Judgement:
    """Choose the fastest setting and judge the choice on prompts it was not made on.

    The best of several settings is partly the luckiest one, so its ratio on the same runs is too
    high: by 0.09 with four prompts and 0.06 with eight, simulated with five settings of equal speed
    that differ by 15% from prompt to prompt. Here the setting is chosen on one half of the prompts
    and judged on the other, averaged over many halvings because a single one is a lottery; the same
    simulation is right to 0.01. A prompt's repeats stay together, since they accept the same
    tokens. Where settings are nearly equal the ratio may be a little below every one's own.

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
    """Return the halves to choose on; the other prompts are the half to judge on."""
    size = len(prompts) // 2
    if math.comb(len(prompts), size) <= _MOST_HALVINGS:
        halves = [set(half) for half in itertools.combinations(prompts, size)]
    else:
        rng = random.Random(0)
        halves = [set(rng.sample(list(prompts), size)) for _ in range(_MOST_HALVINGS // 2)]
    everything = set(prompts)
    # Both ways, so that every prompt is judged, and equally often where that is possible.
    return halves + [everything - half for half in halves]


def _mean(rows: Sequence[Row], weights: Sequence[int]) -> Row:
    total = sum(weights)
    columns = zip(*rows, strict=True)
    a, b, c, d = (sum(map(operator.mul, column, weights)) / total for column in columns)
    return a, b, c, d


@dataclass(frozen=True)
class Timings:
    """The journal of a benchmark, read by setting over the blocks that all settings have."""

    journal: Journal[DecodingRecord]
    blocks: Sequence[bench.Block]

    def records(self, setting: Setting, task: str | None = None) -> list[DecodingRecord]:
        """Return a setting's records of one task set, or of all, always in the same order."""
        chosen = [block for block in self.blocks if task in (None, block[1].task)]
        return [self.journal[setting.label(*block)] for block in chosen]

    def pairs(self, setting: Setting, other: Setting, task: str | None = None) -> list[Pair]:
        return list(zip(self.records(setting, task), self.records(other, task), strict=True))

    def speed(self, setting: Setting, task: str | None = None) -> dict[str, Any]:
        """Return tokens/s and the median time to the first token."""
        records = self.records(setting, task)
        firsts = [r.first_token_seconds for r in records if r.first_token_seconds is not None]
        return {
            "tokens_per_second": tokens_per_second(records),
            "first_token_seconds": statistics.median(firsts) if firsts else None,
        }


def run_bench(
    models: Models,
    assisted: Sequence[Setting],
    prompts: Sequence[EvaluationPrompt],
    config: BenchConfig,
    folder: Path,
) -> dict[str, Any]:
    """Time the settings; return the content of ``results.json``.

    Args:
        models: the folders of target and drafts.
        assisted: from `assisted_settings`.
        prompts: from `draw_prompts`.
        config: repeats, length of answers and time limit.
        folder: keeps ``records.jsonl``; what it holds is not measured again.
    """
    end = time.monotonic() + 60 * (config.max_minutes or math.inf)
    journal: Journal[DecodingRecord] = Journal(folder / "records.jsonl")
    everything = bench.all_settings(assisted)
    runtimes = {
        name: bench.all_settings([s for s in assisted if s.path in paths])
        for name, paths in bench.RUNTIMES.items()
    }
    runtimes = {name: settings for name, settings in runtimes.items() if settings}
    for number, (name, settings) in enumerate(runtimes.items()):
        now = time.monotonic()  # each runtime gets an equal share of the time that is left
        deadline = now + (end - now) / (len(runtimes) - number)
        engine = load_engine(models, settings)
        bench.collect(name, engine, settings, prompts, config, journal, deadline)
        del engine
        _release(models.device)  # before the next runtime loads its own models
    blocks = bench.complete_blocks(journal, everything, prompts, config)
    measured = len({prompt for _, prompt in blocks}) if assisted else 0
    results: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "prompts": {"drawn": len(prompts), "measured": measured},
    }
    return results | summarize(Timings(journal, blocks), assisted)


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def summarize(timings: Timings, assisted: Sequence[Setting]) -> dict[str, Any]:
    """Return ``paths`` and ``best`` of ``results.json``.

    Args:
        timings: at least one block of every task set.
        assisted: the settings that draft.
    """
    ways: dict[str, list[Setting]] = {}
    for setting in assisted:
        ways.setdefault(setting.name, []).append(setting)
    prompts = list(dict.fromkeys(prompt for _, prompt in timings.blocks))
    tasks = dict.fromkeys(prompt.task for prompt in prompts)
    paths = {
        name: {
            "path": settings[0].path,
            "draft": settings[0].draft,
            "prompts": len(prompts),
            # Greedy answers of one path are the same with every draft, but for ties in int8.
            "answers_compared": len(timings.blocks) * len(settings),
            "answers_differing": sum(
                a.tokens != b.tokens for s in settings for a, b in timings.pairs(s, s.baseline)
            ),
            "tasks": {task: _figures(timings, settings, task) for task in tasks},
            "overall": _figures(timings, settings, None),
        }
        for name, settings in ways.items()
    }
    return {"paths": paths, "best": _best(timings, assisted)} if assisted else {"paths": {}}


def _figures(timings: Timings, settings: Sequence[Setting], task: str | None) -> dict[str, Any]:
    """Return the results of one path on one task set, or on all of them."""
    baseline, stock = settings[0].baseline, settings[0].stock
    pairs = {s: timings.pairs(s, baseline, task) for s in settings}
    sweep: dict[str, dict[str, Any]] = {}
    for setting in settings:
        records = timings.records(setting, task)
        known = any(r.drafted for r in records)  # GenAI's prompt lookup does not report it
        sweep[str(setting.num_assistant_tokens)] = {
            **timings.speed(setting, task),
            "ratio": paired_ratio(pairs[setting]).triple(),
            "acceptance_rate": acceptance_rate(records) if known else None,
            "block_efficiency": block_efficiency(records),
        }
    judgement = judge(pairs)
    figures = {
        **{f"alone_{key}": value for key, value in timings.speed(baseline, task).items()},
        "sweep": sweep,
        "best_num_assistant_tokens": judgement.best.num_assistant_tokens,
        **judgement.to_dict(),
    }
    if stock is not None:
        figures["stock"] = {
            **timings.speed(stock, task),
            "kernels_ratio": paired_ratio(timings.pairs(baseline, stock, task)).triple(),
            "best_ratio": paired_ratio(timings.pairs(judgement.best, stock, task)).triple(),
        }
    return figures


def _best(timings: Timings, assisted: Sequence[Setting]) -> dict[str, Any]:
    """Return the fastest setting of all, judged, and the fastest engine for the target alone.

    Tokens/s decide, because a user waits for them; weights of different formats meet here (float32
    through PyTorch, int8 through OpenVINO).
    """
    judgement = judge({s: timings.pairs(s, s.baseline) for s in assisted})
    alone = bench.all_settings(assisted)[: -len(assisted)]
    speeds = {engine.path: tokens_per_second(timings.records(engine)) for engine in alone}
    fastest = max(speeds, key=lambda engine: speeds[engine])
    best = judgement.best
    return {
        "path": best.path,
        "draft": best.draft,
        "num_assistant_tokens": best.num_assistant_tokens,
        **timings.speed(best),
        **judgement.to_dict(),
        "fastest_alone": {"engine": fastest, "tokens_per_second": speeds[fastest]},
    }
