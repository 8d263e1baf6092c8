"""Block efficiency of speculative decoding, for ``evaluate.load``."""

from fastdraft_hf.eval import metrics
from fastdraft_hf.eval.modules import base


class BlockEfficiency(base.SpeculativeMetric):
    """Block efficiency: emitted tokens per forward pass of the target, at most γ + 1.

    Columns ``new_tokens`` and ``target_passes``: one count per answer. The pass that reads the
    prompt counts.

    Example:
        >>> metric = evaluate.load(fastdraft_hf.metric_path("block_efficiency"))
        >>> metric.compute(new_tokens=[28, 8], target_passes=[10, 5])
        {'block_efficiency': 2.4}
    """

    metric = "block_efficiency"
    formula = metrics.block_efficiency
