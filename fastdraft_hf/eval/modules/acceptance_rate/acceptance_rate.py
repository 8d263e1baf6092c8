"""Acceptance rate of speculative decoding: accepted draft tokens / drafted tokens."""

# Stands alone, so that a Hub Space can hold it. `evaluate` reads the imports line by line.
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """\
Acceptance rate of speculative decoding: the share of the tokens proposed by the draft model that
the target model accepts. A ratio of sums over answers, not a mean of ratios.
"""

_KWARGS_DESCRIPTION = """
Args:
    drafted (list of int): tokens drafted, one number an answer.
    accepted (list of int): tokens accepted of them, one number an answer.
    confidence_level (float, optional): adds a percentile bootstrap interval over answers at this
        level, such as 0.95.
    n_resamples (int): resamples of the bootstrap; 1000 by default.
    seed (int): of the bootstrap; 0 by default.

With the configuration `rounds`, `drafted` and `accepted` hold a list of ints an answer, one number
a round (a forward pass of the target).

Returns:
    acceptance_rate (float): between 0 and 1; 0 when nothing was drafted.
    acceptance_rate_low, acceptance_rate_high (float): with `confidence_level`.
    acceptance_by_position (list of float): with `rounds`; for each place in a block, the share
        accepted up to there of the blocks that drafted so far.

Raises:
    ValueError: no answers, a negative number, more accepted than drafted, or lists of different
        lengths.

Examples:
    >>> metric = evaluate.load("acceptance_rate")
    >>> metric.compute(drafted=[30, 12], accepted=[18, 3])
    {'acceptance_rate': 0.5}
    >>> metric = evaluate.load("acceptance_rate", "rounds")
    >>> metric.compute(drafted=[[2, 2], [1, 1]], accepted=[[2, 0], [1, 0]])
    {'acceptance_rate': 0.5, 'acceptance_by_position': [0.5, 0.5]}
"""

_CITATION = """\
@inproceedings{leviathan2023fast,
  title={Fast Inference from Transformers via Speculative Decoding},
  author={Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  booktitle={International Conference on Machine Learning},
  year={2023},
  url={https://arxiv.org/abs/2211.17192}
}
@inproceedings{zafrir2025fastdraft,
  title={FastDraft: How to Train Your Draft},
  author={Zafrir, Ofir and Margulis, Igor and Shteyman, Dorin and Guskin, Shira and Boudoukh, Guy},
  booktitle={Findings of the Association for Computational Linguistics: ACL 2025},
  year={2025},
  url={https://arxiv.org/abs/2411.11055}
}
"""

# What the other two metrics read. Taken and not read here, so that one set of columns can be given
# to each of the three and to `evaluate.combine`.
_OTHERS = {"new_tokens", "target_passes", "cost_ratio", "num_assistant_tokens"}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AcceptanceRate(evaluate.Metric):
    """Configurations: ``default`` (a number an answer) and ``rounds`` (a list an answer)."""

    def _info(self) -> Any:
        if self.config_name not in ("default", "rounds"):
            raise ValueError(
                f"acceptance_rate has the configurations default and rounds, not {self.config_name}"
            )
        count = datasets.Value("int64")
        feature = datasets.Sequence(count) if self.config_name == "rounds" else count
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"drafted": feature, "accepted": feature}),
            reference_urls=["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2411.11055"],
        )

    def _compute(
        self,
        drafted: Sequence[Any],
        accepted: Sequence[Any],
        confidence_level: float | None = None,
        n_resamples: int = 1000,
        seed: int = 0,
        **others: Any,
    ) -> dict[str, Any]:
        if unknown := set(others) - _OTHERS:
            raise TypeError(f"acceptance_rate takes no {', '.join(sorted(unknown))}")
        rounds = self.config_name == "rounds"
        if not rounds:
            drafted, accepted = [[d] for d in drafted], [[a] for a in accepted]
        blocks = _blocks(drafted, accepted)
        answers = [(sum(d for d, _ in one), sum(a for _, a in one)) for one in blocks]
        result: dict[str, Any] = {"acceptance_rate": _rate(answers)}
        if confidence_level is not None:
            low, high = _interval(answers, _rate, confidence_level, n_resamples, seed)
            result |= {"acceptance_rate_low": low, "acceptance_rate_high": high}
        if rounds:
            result["acceptance_by_position"] = _by_position([b for one in blocks for b in one])
        return result


Pair = tuple[int, int]


def _blocks(drafted: Sequence[Any], accepted: Sequence[Any]) -> list[list[Pair]]:
    """Return (drafted, accepted) of every round of every answer, checked."""
    if not drafted:
        raise ValueError("acceptance_rate needs at least one answer")
    blocks = []
    for answer, (ds, accs) in enumerate(zip(drafted, accepted, strict=True)):
        if len(ds) != len(accs):
            raise ValueError(f"answer {answer}: {len(ds)} rounds drafted, {len(accs)} accepted")
        for d, a in zip(ds, accs, strict=True):
            if a < 0 or d < 0:
                raise ValueError(f"answer {answer}: {d} tokens drafted, {a} accepted; below 0")
            if a > d:
                raise ValueError(f"answer {answer}: {d} tokens drafted, but {a} accepted")
        blocks.append(list(zip(ds, accs, strict=True)))
    return blocks


def _rate(answers: Sequence[Pair]) -> float:
    drafted = sum(d for d, _ in answers)
    return sum(a for _, a in answers) / drafted if drafted else 0.0


def _by_position(blocks: list[Pair]) -> list[float]:
    shares = []
    for position in range(max((d for d, _ in blocks), default=0)):
        reached = [a for d, a in blocks if d > position]
        shares.append(sum(a > position for a in reached) / len(reached))
    return shares


def _interval(
    answers: Sequence[Pair],
    statistic: Callable[[Sequence[Pair]], float],
    level: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of ``statistic`` over answers."""
    if not 0 < level < 1:
        raise ValueError(f"confidence_level lies between 0 and 1, not at {level}")
    if resamples < 1:
        raise ValueError(f"n_resamples is at least 1, not {resamples}")
    rng = random.Random(seed)
    draws = [statistic(rng.choices(answers, k=len(answers))) for _ in range(resamples)]
    draws.sort()
    last = resamples - 1
    low, high = (1 - level) / 2 * resamples, (1 + level) / 2 * resamples
    return draws[min(int(low), last)], draws[min(int(high), last)]
