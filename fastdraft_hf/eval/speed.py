"""Results of a benchmark: ratios over pairs, the best setting, and whether it pays."""

import itertools
import math
import operator
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.bench import RUNTIMES, Setting, all_settings
from fastdraft_hf.eval.metrics import (
    Estimate,
    Pair,
    Row,
    acceptance_rate,
    block_efficiency,
    paired_ratio,
    paired_row,
    ratio_of_rows,
    tokens_per_second,
)

# The records of every setting. Those of one runtime are of the same prompts, in one order.
Timed = Mapping[Setting, Sequence[DecodingRecord]]

# Ways to halve the prompts: all of them up to eight prompts, else this many at random.
_MOST_HALVINGS = 70


class Judgement(NamedTuple):
    """The fastest setting over all prompts, and the speed-up of choosing in this way."""

    best: Setting
    ratio: Estimate
    is_speed_up: bool

    def to_dict(self) -> dict[str, Any]:
        return {"judged": {"ratio": self.ratio}, "is_speed_up": self.is_speed_up}


def judge(candidates: Mapping[Setting, Sequence[Pair]]) -> Judgement:
    """Choose the fastest setting and judge the choice on prompts it was not made on.

    The best of several settings is partly the luckiest one, so its ratio on the same runs is too
    high (by 0.06 with eight prompts and five settings of equal speed, simulated). Here the setting
    is chosen on one half of the prompts and judged on the other, averaged over many halvings. With
    one prompt or one setting the ratio is that of the same runs.

    ``candidates`` are each setting's pairs (setting, target alone), the same prompts in one order.
    """
    rows = {setting: [paired_row(pair) for pair in pairs] for setting, pairs in candidates.items()}
    prompts = range(len(next(iter(rows.values()))))

    def fastest(on: Iterable[int]) -> Setting:
        def speed(setting: Setting) -> float:
            chosen = [rows[setting][prompt] for prompt in on]
            return sum(row[0] for row in chosen) / max(sum(row[1] for row in chosen), 1e-12)

        return max(rows, key=speed)

    best = fastest(prompts)
    judged = rows[best]
    if len(prompts) > 1 and len(rows) > 1:
        chosen = [Counter[Setting]() for _ in prompts]
        for half in _halves(prompts):
            setting = fastest(half)
            for prompt in set(prompts) - half:
                chosen[prompt][setting] += 1
        judged = [
            _mean([rows[setting][prompt] for setting in counts], list(counts.values()))
            for prompt, counts in enumerate(chosen)
        ]
    ratio = ratio_of_rows(judged)
    # One pair has no spread, so it cannot be told apart from chance.
    return Judgement(best, ratio, len(candidates[best]) > 1 and ratio.low > 1.0)


def _halves(prompts: Sequence[int]) -> list[set[int]]:
    """Return the halves to choose on; the other prompts are the half to judge on."""
    size = len(prompts) // 2
    if math.comb(len(prompts), size) <= _MOST_HALVINGS:
        halves = [set(half) for half in itertools.combinations(prompts, size)]
    else:
        rng = random.Random(0)
        halves = [set(rng.sample(prompts, size)) for _ in range(_MOST_HALVINGS // 2)]
    # Both ways, so that every prompt is judged, and equally often where that is possible.
    return halves + [set(prompts) - half for half in halves]


def _mean(rows: Sequence[Row], weights: Sequence[int]) -> Row:
    total = sum(weights)
    columns = zip(*rows, strict=True)
    a, b, c, d = (sum(map(operator.mul, column, weights)) / total for column in columns)
    return a, b, c, d


def summarize(timed: Timed, assisted: Sequence[Setting]) -> dict[str, Any]:
    """Return ``paths`` and ``best`` of ``results.json``; ``timed`` has every task set."""
    ways: dict[str, list[Setting]] = {}
    for setting in assisted:
        ways.setdefault(setting.path, []).append(setting)
    paths = {
        name: {
            # Greedy answers of one path are the same with every draft, but for ties in int8.
            "answers_differing": sum(
                a.tokens != b.tokens for s in settings for a, b in _pairs(timed, s, s.baseline)
            ),
            "tasks": {
                task: _figures(timed, settings, task)
                for task in dict.fromkeys(record.task for record in timed[settings[0]])
            },
            "overall": _figures(timed, settings, None),
        }
        for name, settings in ways.items()
    }
    return {"paths": paths, "best": _best(timed, assisted)} if assisted else {"paths": {}}


def _records(timed: Timed, setting: Setting, task: str | None) -> list[DecodingRecord]:
    return [record for record in timed[setting] if task in (None, record.task)]


def _pairs(timed: Timed, one: Setting, other: Setting, task: str | None = None) -> list[Pair]:
    return list(zip(_records(timed, one, task), _records(timed, other, task), strict=True))


def _speed(timed: Timed, setting: Setting, task: str | None) -> dict[str, Any]:
    records = _records(timed, setting, task)
    firsts = [r.first_token_seconds for r in records if r.first_token_seconds is not None]
    return {
        "tokens_per_second": tokens_per_second(records),
        "first_token_seconds": statistics.median(firsts) if firsts else None,
    }


def _figures(timed: Timed, settings: Sequence[Setting], task: str | None) -> dict[str, Any]:
    """Return the results of one path on one task set, or on all of them."""
    baseline, stock = settings[0].baseline, settings[0].stock
    pairs = {s: _pairs(timed, s, baseline, task) for s in settings}
    sweep: dict[str, dict[str, Any]] = {}
    for setting in settings:
        records = _records(timed, setting, task)
        known = any(r.drafted for r in records)  # GenAI's prompt lookup does not report it
        sweep[str(setting.num_assistant_tokens)] = {
            **_speed(timed, setting, task),
            "ratio": paired_ratio(pairs[setting]),
            "acceptance_rate": acceptance_rate(records) if known else None,
            "block_efficiency": block_efficiency(records),
        }
    judgement = judge(pairs)
    figures = {
        "prompts": len(pairs[settings[0]]),
        **{f"alone_{key}": value for key, value in _speed(timed, baseline, task).items()},
        "sweep": sweep,
        "best_num_assistant_tokens": judgement.best.num_assistant_tokens,
        **judgement.to_dict(),
    }
    if stock is not None:
        figures["stock"] = {
            "tokens_per_second": tokens_per_second(_records(timed, stock, task)),
            "kernels_ratio": paired_ratio(_pairs(timed, baseline, stock, task)),
        }
    return figures


def _best(timed: Timed, assisted: Sequence[Setting]) -> dict[str, Any]:
    """Return the fastest setting of all, judged, and the fastest engine for the target alone.

    Tokens/s decide, on the prompts that every runtime has timed; weights of different formats meet
    here. Where that leaves a choice between settings of one runtime, all of its prompts decide.
    """
    keys = ({(r.task, r.key) for r in timed[s]} for s in assisted)
    shared = set.intersection(*keys)

    def speed(setting: Setting) -> float:
        return tokens_per_second([r for r in timed[setting] if (r.task, r.key) in shared])

    fastest = max(assisted, key=speed)
    runtime = next(paths for paths in RUNTIMES.values() if fastest.path in paths)
    judgement = judge({s: _pairs(timed, s, s.baseline) for s in assisted if s.path in runtime})
    best = judgement.best
    alone = max(all_settings(assisted)[: -len(assisted)], key=speed)
    return {
        "path": best.path,
        "num_assistant_tokens": best.num_assistant_tokens,
        "tokens_per_second": speed(best),
        **judgement.to_dict(),
        "fastest_alone": {"engine": alone.path, "tokens_per_second": speed(alone)},
    }
