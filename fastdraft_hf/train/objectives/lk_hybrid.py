"""KL far from the target, total variation close to it (Samarin et al. 2026, arXiv 2602.23881)."""

from __future__ import annotations

import torch

from fastdraft_hf.train.objectives import register_term
from fastdraft_hf.train.objectives.base import Pair, Term
from fastdraft_hf.train.objectives.kl import ForwardKL
from fastdraft_hf.train.objectives.tvd import TotalVariation

_DECAY = 3.0


@register_term
class LKHybrid(Term):
    """``lk_hybrid`` = λ·KL + (1 − λ)·TV with λ = exp(−3α), α and λ of each token, λ detached.

    KL gives a useful gradient where the draft is still far off; total variation is what acceptance
    is, and takes over as α grows.
    """

    name = "lk_hybrid"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        share = torch.exp(-_DECAY * pair.acceptance)
        kl, kl_slope = ForwardKL().value_and_slope(pair)
        tv, tv_slope = TotalVariation().value_and_slope(pair)
        slope = share[:, None] * kl_slope + (1 - share[:, None]) * tv_slope
        return share * kl + (1 - share) * tv, slope

    def reference(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        share = torch.exp(-_DECAY * torch.minimum(p, q).sum(-1)).detach()
        return share * ForwardKL().reference(p, q) + (1 - share) * TotalVariation().reference(p, q)
