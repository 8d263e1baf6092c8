"""Script of the metric, for ``evaluate.load``."""

from fastdraft_hf.eval.modules.base import AcceptanceRate as AcceptanceRate
