"""MBSU, the memory-bound speed-up of speculative decoding, for ``evaluate.load``."""

from fastdraft_hf.eval import metrics
from fastdraft_hf.eval.modules import base


class MBSU(base.SpeculativeMetric):
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

    def formula(records, cost_ratio, num_assistant_tokens):  # type: ignore[no-untyped-def]
        efficiency = metrics.block_efficiency(records)
        return metrics.mbsu(efficiency, cost_ratio, num_assistant_tokens)
