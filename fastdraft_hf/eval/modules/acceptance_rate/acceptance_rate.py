"""Acceptance rate of speculative decoding, for ``evaluate.load``."""

from fastdraft_hf.eval import metrics
from fastdraft_hf.eval.modules import base


class AcceptanceRate(base.SpeculativeMetric):
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
    formula = metrics.acceptance_rate
