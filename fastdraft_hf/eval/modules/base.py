"""The three metrics for `evaluate`."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import datasets
import evaluate

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
    arguments: tuple[str, ...] = ()
    formula: Callable[..., float]

    def _info(self) -> Any:
        if self.config_name != "default":
            raise ValueError(f"{self.metric} has no configuration {self.config_name}")
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=SpeculativeMetric.__doc__,
            features=datasets.Features(dict.fromkeys(self.columns, datasets.Value("int64"))),
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
        return result

    def _record(
        self, answer: int, a: int, b: int, num_assistant_tokens: float = math.inf, **_: Any
    ) -> Any:
        """Return an answer's counts, checked, under the names of the columns."""
        if a < 0 or b < 0:
            raise ValueError(f"answer {answer}: a count is below 0")
        if "drafted" in self.columns and b > a:
            raise ValueError(f"answer {answer}: {a} tokens drafted, {b} accepted")
        if "new_tokens" in self.columns and a > 0 == b:
            raise ValueError(f"answer {answer}: {a} tokens without a pass of the target")
        if "new_tokens" in self.columns and b and a / b > (limit := num_assistant_tokens + 1):
            raise ValueError(f"answer {answer}: more than γ + 1 = {limit} tokens per pass")
        return SimpleNamespace(**dict(zip(self.columns, (a, b), strict=True)))


class AcceptanceRate(SpeculativeMetric):
    """Acceptance rate: the share of drafted tokens that the target accepts.

    Columns ``drafted`` and ``accepted``: one count per answer.

    Example:
        >>> metric = evaluate.load(fastdraft_hf.metric_path("acceptance_rate"))
        >>> metric.compute(drafted=[30, 12], accepted=[18, 3])
        {'acceptance_rate': 0.5}
    """

    metric = "acceptance_rate"
    columns = ("drafted", "accepted")
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
