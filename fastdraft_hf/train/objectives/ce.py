"""Cross-entropy on the label: pre-training, and sequence-level knowledge distillation.

On text the target wrote it is the whole of FastDraft's alignment (arXiv 2411.11055, section 3.3).
"""

from __future__ import annotations

import torch

from fastdraft_hf.train.objectives import register_term
from fastdraft_hf.train.objectives.base import Pair, Term


@register_term
class CrossEntropy(Term):
    """``ce`` = −log q at the label.

    Its p puts all mass on the label, so it is the one term that needs no distribution from the
    target: the head computes it from the labels and does not ask `value_and_slope`.
    """

    name = "ce"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return -(pair.p * pair.log_q).sum(-1), -pair.p

    def reference(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return -torch.xlogy(p, q).sum(-1)
