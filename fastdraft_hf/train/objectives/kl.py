"""Forward Kullback-Leibler divergence (Hinton et al. 2015; the paper's KL, arXiv 2411.11055)."""

from __future__ import annotations

import torch

from fastdraft_hf.train.objectives import register_term
from fastdraft_hf.train.objectives.base import Pair, Term


@register_term
class ForwardKL(Term):
    """``kl`` = Σ p (log p − log q): the draft covers whatever the target may say."""

    name = "kl"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return (pair.p * (pair.log_p - pair.log_q)).sum(-1), -pair.p

    def reference(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
