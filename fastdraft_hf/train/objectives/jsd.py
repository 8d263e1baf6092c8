"""Jensen-Shannon divergence (Lin 1991; for distillation Agarwal et al. 2023, arXiv 2306.13649)."""

from __future__ import annotations

import math

import torch

from fastdraft_hf.train.objectives import register_term
from fastdraft_hf.train.objectives.base import Pair, Term


@register_term
class JensenShannon(Term):
    """``jsd`` = ½ KL(p‖m) + ½ KL(q‖m) with m = ½ (p + q); between 0 and log 2."""

    name = "jsd"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        log_m = torch.logaddexp(pair.log_p, pair.log_q) - math.log(2)
        # d/dlog q = ½ q (log q − log m): what comes from m and from q's own factor cancels.
        difference = 0.5 * (pair.log_q - log_m)
        values = (0.5 * pair.p * (pair.log_p - log_m) + pair.q * difference).sum(-1)
        return values, pair.slope_of(difference)

    def reference(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        m = (p + q) / 2
        return (
            (torch.xlogy(p, p) - torch.xlogy(p, m)) / 2
            + (torch.xlogy(q, q) - torch.xlogy(q, m)) / 2
        ).sum(-1)
