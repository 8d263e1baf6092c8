"""MBSU, the memory-bound speed-up of speculative decoding."""

# Stands alone, so that a Hub Space can hold it. `evaluate` reads the imports line by line.
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """\
MBSU, memory-bound speed-up of speculative decoding: block efficiency / (c·γ + 1), the speed-up of
a machine whose time is the reading of weights, when the draft model costs c of the target model.
"""

_KWARGS_DESCRIPTION = """
Args:
    new_tokens (list of int): tokens emitted, one number an answer.
    target_passes (list of int): forward passes of the target, one number an answer; the one that
        reads the prompt counts.
    cost_ratio (float): c, parameters of the draft / parameters of the target.
    num_assistant_tokens (int): γ, tokens drafted a round.
    confidence_level (float, optional): adds a percentile bootstrap interval over answers at this
        level, such as 0.95.
    n_resamples (int): resamples of the bootstrap; 1000 by default.
    seed (int): of the bootstrap; 0 by default.

Returns:
    mbsu (float): above 1 the draft pays, under this model of the machine.
    mbsu_low, mbsu_high (float): with `confidence_level`.

Raises:
    ValueError: no answers, a negative number, tokens without a pass, more than γ + 1 tokens a
        pass, lists of different lengths, or cost_ratio or num_assistant_tokens missing.

Examples:
    >>> metric = evaluate.load("mbsu")
    >>> metric.compute(
    ...     new_tokens=[28, 8], target_passes=[10, 5], cost_ratio=0.0625, num_assistant_tokens=4
    ... )
    {'mbsu': 1.92}
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
_OTHERS = {"drafted", "accepted"}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MBSU(evaluate.Metric):
    def _info(self) -> Any:
        if self.config_name != "default":
            raise ValueError(f"mbsu has no configuration {self.config_name}")
        count = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"new_tokens": count, "target_passes": count}),
            reference_urls=["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2411.11055"],
        )

    def _compute(
        self,
        new_tokens: Sequence[int],
        target_passes: Sequence[int],
        cost_ratio: float | None = None,
        num_assistant_tokens: int | None = None,
        confidence_level: float | None = None,
        n_resamples: int = 1000,
        seed: int = 0,
        **others: Any,
    ) -> dict[str, float]:
        if unknown := set(others) - _OTHERS:
            raise TypeError(f"mbsu takes no {', '.join(sorted(unknown))}")
        if cost_ratio is None or num_assistant_tokens is None:
            raise ValueError("mbsu needs cost_ratio (c) and num_assistant_tokens (γ)")
        if cost_ratio < 0 or num_assistant_tokens < 0:
            raise ValueError(f"mbsu: c = {cost_ratio} and γ = {num_assistant_tokens}; below 0")
        answers = _answers(new_tokens, target_passes)
        for answer, (tokens, passes) in enumerate(answers):
            if tokens > (num_assistant_tokens + 1) * passes:
                raise ValueError(
                    f"answer {answer}: {tokens} tokens in {passes} passes are more than γ + 1 = "
                    f"{num_assistant_tokens + 1} a pass"
                )
        cost = cost_ratio * num_assistant_tokens + 1
        result = {"mbsu": _efficiency(answers) / cost}
        if confidence_level is not None:
            low, high = _interval(answers, _efficiency, confidence_level, n_resamples, seed)
            result |= {"mbsu_low": low / cost, "mbsu_high": high / cost}
        return result


Pair = tuple[int, int]


def _answers(new_tokens: Sequence[int], target_passes: Sequence[int]) -> list[Pair]:
    """Return (tokens, passes) of every answer, checked."""
    if not new_tokens:
        raise ValueError("mbsu needs at least one answer")
    answers = list(zip(new_tokens, target_passes, strict=True))
    for answer, (tokens, passes) in enumerate(answers):
        if tokens < 0 or passes < 0:
            raise ValueError(f"answer {answer}: {tokens} tokens in {passes} passes; below 0")
        if tokens and not passes:
            raise ValueError(f"answer {answer}: {tokens} tokens without a pass of the target")
    return answers


def _efficiency(answers: Sequence[Pair]) -> float:
    passes = sum(p for _, p in answers)
    return sum(t for t, _ in answers) / passes if passes else 1.0


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
