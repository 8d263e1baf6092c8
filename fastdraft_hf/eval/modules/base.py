"""The part that the three metrics for `evaluate` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval import metrics

_PAPERS = ["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2411.11055"]
_COLUMNS = ("drafted", "accepted", "new_tokens", "target_passes")
_ARGUMENTS = ("cost_ratio", "num_assistant_tokens")


class SpeculativeMetric(evaluate.Metric):
    """One metric of speculative decoding over the counts of several answers.

    Every metric accepts the columns and arguments of the other two and ignores them, so one set of
    inputs fits all three and ``evaluate.combine``.

    ``compute`` takes, beside the columns:
        confidence_level: adds a percentile bootstrap interval over answers, such as 0.95, as
            ``NAME_low`` and ``NAME_high``.
        n_resamples: resamples of the bootstrap, 1000 by default.
        seed: of the bootstrap, 0 by default.

    Raises:
        ValueError: the counts are impossible (the message names the answer), there are no answers,
            or an argument is missing or out of range.
        TypeError: an argument is unknown.
    """

    metric = ""
    columns: tuple[str, str] = ("new_tokens", "target_passes")
    configs: tuple[str, ...] = ("default",)
    arguments: tuple[str, ...] = ()

    def statistic(self, records: Sequence[DecodingRecord], **arguments: Any) -> float:
        """Return the metric's value over some answers."""
        raise NotImplementedError

    def check(self, answer: int, record: DecodingRecord, **arguments: Any) -> None:
        """Raise `ValueError` if an answer's counts are impossible."""
        if record.counted_tokens and not record.target_passes:
            raise ValueError(
                f"answer {answer}: {record.counted_tokens} tokens without a pass of the target"
            )

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
            reference_urls=_PAPERS,
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
        arguments = {name: given.get(name) for name in self.arguments}
        for name, value in arguments.items():
            if value is None or value < 0:
                raise ValueError(f"{self.metric} needs {name}, at least 0; got {value}")
        if confidence_level is not None and not 0 < confidence_level < 1:
            raise ValueError(f"confidence_level must be between 0 and 1, got {confidence_level}")
        if n_resamples < 1:
            raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
        records = self._records(*(given[name] for name in self.columns))
        for answer, record in enumerate(records):
            self.check(answer, record, **arguments)

        def statistic(drawn: Sequence[DecodingRecord]) -> float:
            return self.statistic(drawn, **arguments)

        result: dict[str, Any] = {self.metric: statistic(records)}
        if confidence_level is not None:
            found = metrics.bootstrap(
                records, statistic, samples=n_resamples, seed=seed, level=confidence_level
            )
            result |= {f"{self.metric}_low": found.low, f"{self.metric}_high": found.high}
        if self.config_name == "rounds":
            result["acceptance_by_position"] = metrics.acceptance_by_position(records)
        return result

    def _records(self, first: Sequence[Any], second: Sequence[Any]) -> list[DecodingRecord]:
        """Return one record per answer that holds the two columns, checked."""
        if not first:
            raise ValueError(f"{self.metric} needs at least one answer")
        records = []
        for answer, values in enumerate(zip(first, second, strict=True)):
            one, other = ([v] if isinstance(v, int) else v for v in values)
            if len(one) != len(other):
                raise ValueError(
                    f"answer {answer}: {len(one)} rounds in {self.columns[0]}, {len(other)} in "
                    f"{self.columns[1]}"
                )
            if min((*one, *other), default=0) < 0:
                raise ValueError(f"answer {answer}: a count is below 0")
            record = DecodingRecord("", "", str(answer), 0.0, 0, [], 0.0, 0)
            if self.columns[0] == "drafted":
                record.rounds = list(zip(one, other, strict=True))
                record.drafted, record.accepted = sum(one), sum(other)
            else:
                record.counted_tokens, record.target_passes = sum(one), sum(other)
            records.append(record)
        return records
