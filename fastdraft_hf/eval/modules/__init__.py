"""Acceptance rate, block efficiency and MBSU as metrics that ``evaluate.load`` reads.

`evaluate` wants a script for each metric; the scripts import their class from `base`. The formulas
are those of `fastdraft_hf.eval.metrics`.
"""

from pathlib import Path

from fastdraft_hf._errors import FastDraftError, nearest

METRICS = ("acceptance_rate", "block_efficiency", "mbsu")


def metric_path(name: str) -> str:
    """Return the script of a metric, for ``evaluate.load``.

    Args:
        name: ``acceptance_rate``, ``block_efficiency`` or ``mbsu``.

    Raises:
        FastDraftError: there is no such metric.

    Example:
        >>> metric = evaluate.load(fastdraft_hf.metric_path("acceptance_rate"))
        >>> metric.compute(drafted=[30, 12], accepted=[18, 3])
        {'acceptance_rate': 0.5}
    """
    if name not in METRICS:
        raise FastDraftError(
            f"no metric '{name}'{nearest(name, METRICS)}; valid names: {', '.join(METRICS)}"
        )
    return str(Path(__file__).with_name(f"{name}.py"))
