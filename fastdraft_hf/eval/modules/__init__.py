"""Acceptance rate, block efficiency and MBSU as modules that ``evaluate.load`` reads.

One folder each, in the form of a Hub Space of evaluate's: the module, its card, its requirements.
A module imports nothing of this package, so that a folder can be pushed and used as it is;
`tests/eval/test_modules.py` holds its formula equal to `fastdraft_hf.eval.metrics`.
"""

from __future__ import annotations

from pathlib import Path

from fastdraft_hf._errors import FastDraftError, nearest

METRICS = ("acceptance_rate", "block_efficiency", "mbsu")


def metric_path(name: str) -> str:
    """Return the folder of a metric, for ``evaluate.load``.

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
            f"no metric '{name}'{nearest(name, METRICS)}; there are {', '.join(METRICS)}"
        )
    return str(Path(__file__).parent / name)
