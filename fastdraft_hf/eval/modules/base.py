"""The three metrics for `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import datasets
import evaluate

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval import metrics

_COLUMNS = ("drafted", "accepted", "new_tokens", "target_passes")
_ARGUMENTS = ("cost_ratio", "num_assistant_tokens")


class SpeculativeMetric(evaluate.Metric):
    """A metric over the counts of several answers.

    ``compute`` takes two columns, and further:
        confidence_level: adds ``NAME_low`` and ``NAME_high``, a percentile bootstrap interval over
            answers at this level, such as 0.95.
        n_resamples: resamples of the bootstrap, 1000 by default.
        seed: of the bootstrap, 0 by default.

    Columns and arguments of the other two metrics are accepted and ignored, so one set of inputs
    fits all three and ``evaluate.combine``. Impossible counts are a ``ValueError`` that names the
    answer.
    """

    metric = ""
    columns: tuple[str, str] = ("new_tokens", "target_passes")
    configs: tuple[str, ...] = ("default",)
    arguments: tuple[str, ...] = ()
    formula: Callable[..., float]

    def _info(self) -> Any:
        if self.config_name not in self.configs:
            raise ValueError(
                f"{self.metric} has the configurations {', '.join(self.configs)}, not "
                f"{self.config_name}"
            )
        count = datasets.Value("int64")
        feature = datasets.Sequence(count) if self.config_name == "rounds" else count
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=SpeculativeMetric.__doc__,
            features=datasets.Features(dict.fromkeys(self.columns, feature)),
            reference_urls=["https://arxiv.org/abs/2411.11055"],
        )

    def _compute(
        self,
        confidence_level: float | None = None,
        n_resamples: int = 1000,
        seed: int = 0,
        **given: Any,
    ) -> dict[str, Any]:
        if unknown := set(given) - {*_COLUMNS, *_ARGUMENTS}:
            raise TypeError(f"{self.metric} takes no {', '.join(sorted(unknown))}")
        for name in self.arguments:
            if (value := given.get(name)) is None or value < 0:
                raise ValueError(f"{self.metric} needs {name}, at least 0; got {value}")
        if confidence_level is not None and not 0 < confidence_level < 1:
            raise ValueError(f"confidence_level must be between 0 and 1, got {confidence_level}")
        if n_resamples < 1:
            raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
        arguments = {name: given[name] for name in self.arguments}
        pairs = zip(*(given[name] for name in self.columns), strict=True)
        records = [self._record(n, *pair, **arguments) for n, pair in enumerate(pairs)]
        if not records:
            raise ValueError(f"{self.metric} needs at least one answer")
        found = metrics.bootstrap(
            records,
            lambda drawn: self.formula(drawn, **arguments),
            samples=n_resamples if confidence_level else 0,
            seed=seed,
            level=confidence_level or 0.95,
        )
        result: dict[str, Any] = {self.metric: found.value}
        if confidence_level is not None:
            result |= {f"{self.metric}_low": found.low, f"{self.metric}_high": found.high}
        if self.config_name == "rounds":
            result["acceptance_by_position"] = metrics.acceptance_by_position(records)
        return result

    def _record(
        self, answer: int, first: Any, second: Any, num_assistant_tokens: float = math.inf, **_: Any
    ) -> DecodingRecord:
        """Return an answer's counts, checked, as a record."""
        ones, others = ([v] if isinstance(v, int) else v for v in (first, second))
        if len(ones) != len(others):
            raise ValueError(
                f"answer {answer}: {len(ones)} rounds in drafted, {len(others)} in accepted"
            )
        counts = {"new_tokens": 0, "target_passes": 0, self.columns[0]: sum(ones)}
        counts[self.columns[1]] = sum(others)
        rounds = list(zip(ones, others, strict=True))
        for a, b in rounds:
            if a < 0 or b < 0:
                raise ValueError(f"answer {answer}: a count is below 0")
            if "drafted" in counts and b > a:
                raise ValueError(f"answer {answer}: {a} tokens drafted, {b} accepted")
        new, passes = counts.pop("new_tokens"), counts.pop("target_passes")
        if new and not passes:
            raise ValueError(f"answer {answer}: {new} tokens without a pass of the target")
        if new > (limit := num_assistant_tokens + 1) * passes:
            raise ValueError(f"answer {answer}: more than γ + 1 = {limit} tokens per pass")
        rounds = rounds if counts else []
        return DecodingRecord(
            "", "", "", 0.0, 0, [], 0.0, passes, counted_tokens=new, rounds=rounds, **counts
        )


class AcceptanceRate(SpeculativeMetric):
    """Acceptance rate: the share of drafted tokens that the target accepts.

    Columns ``drafted`` and ``accepted``: one count per answer. With the configuration ``rounds``,
    one list of counts per answer, a count per round; the result then has
    ``acceptance_by_position`` too.

    Example:
        >>> metric = evaluate.load(fastdraft_hf.metric_path("acceptance_rate"))
        >>> metric.compute(drafted=[30, 12], accepted=[18, 3])
        {'acceptance_rate': 0.5}
        >>> metric = evaluate.load(fastdraft_hf.metric_path("acceptance_rate"), "rounds")
        >>> metric.compute(drafted=[[2, 2], [1, 1]], accepted=[[2, 0], [1, 0]])
        {'acceptance_rate': 0.5, 'acceptance_by_position': [0.5, 0.5]}
    """

    metric = "acceptance_rate"
    columns = ("drafted", "accepted")
    configs = ("default", "rounds")
    formula = staticmethod(metrics.acceptance_rate)


class BlockEfficiency(SpeculativeMetric):
    """Block efficiency: emitted tokens per forward pass of the target, at most γ + 1.

    Columns ``new_tokens`` and ``target_passes``: one count per answer. The pass that reads the
    prompt counts.

    Example:
        >>> metric = evaluate.load(fastdraft_hf.metric_path("block_efficiency"))
        >>> metric.compute(new_tokens=[28, 8], target_passes=[10, 5])
        {'block_efficiency': 2.4}
    """

    metric = "block_efficiency"
    formula = staticmethod(metrics.block_efficiency)


class MBSU(SpeculativeMetric):
    """MBSU: block efficiency / (c·γ + 1), the speed-up of a machine limited by reading weights.

    Columns ``new_tokens`` and ``target_passes``: one count per answer. Arguments ``cost_ratio``
    (c, draft parameters / target parameters) and ``num_assistant_tokens`` (γ).

    Example:
        >>> metric = evaluate.load(fastdraft_hf.metric_path("mbsu"))
        >>> metric.compute(
        ...     new_tokens=[28, 8], target_passes=[10, 5], cost_ratio=0.0625, num_assistant_tokens=4
        ... )
        {'mbsu': 1.92}
    """

    metric = "mbsu"
    arguments = ("cost_ratio", "num_assistant_tokens")

    def formula(self, records: Any, cost_ratio: float, num_assistant_tokens: int) -> float:
        return metrics.mbsu(metrics.block_efficiency(records), cost_ratio, num_assistant_tokens)
