"""The part that the three metrics for `evaluate` share."""

from __future__ import annotations

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
        extra = [given.get(name) for name in self.arguments]
        for name, value in zip(self.arguments, extra, strict=True):
            if value is None or value < 0:
                raise ValueError(f"{self.metric} needs {name}, at least 0; got {value}")
        if confidence_level is not None and not 0 < confidence_level < 1:
            raise ValueError(f"confidence_level must be between 0 and 1, got {confidence_level}")
        if n_resamples < 1:
            raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
        pairs = zip(*(given[name] for name in self.columns), strict=True)
        limit = given["num_assistant_tokens"] + 1 if self.arguments else None
        records = [self._record(n, a, b, limit) for n, (a, b) in enumerate(pairs)]
        if not records:
            raise ValueError(f"{self.metric} needs at least one answer")
        found = metrics.bootstrap(
            records,
            lambda drawn: type(self).formula(drawn, *extra),
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

    def _record(self, answer: int, first: Any, second: Any, limit: int | None) -> DecodingRecord:
        """Return an answer's counts as a record, checked; ``limit`` is of tokens per pass."""
        one, other = ([v] if isinstance(v, int) else v for v in (first, second))
        name, second_name = self.columns
        if len(one) != len(other):
            raise ValueError(
                f"answer {answer}: {len(one)} rounds in {name}, {len(other)} in {second_name}"
            )
        record = DecodingRecord("", "", str(answer), 0.0, 0, [], 0.0, 0)
        for a, b in zip(one, other, strict=True):
            if a < 0 or b < 0:
                raise ValueError(f"answer {answer}: a count is below 0")
            if name == "drafted" and b > a:
                raise ValueError(f"answer {answer}: {a} tokens drafted, {b} accepted")
            if name != "drafted" and a and not b:
                raise ValueError(f"answer {answer}: {a} tokens without a pass of the target")
            if limit is not None and a > limit * b:
                raise ValueError(f"answer {answer}: more than γ + 1 = {limit} tokens per pass")
        if name == "drafted":
            record.rounds = list(zip(one, other, strict=True))
            record.drafted, record.accepted = sum(one), sum(other)
        else:
            record.counted_tokens, record.target_passes = sum(one), sum(other)
        return record
