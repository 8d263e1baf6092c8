"""Reverse Kullback-Leibler divergence (Gu et al. 2023, MiniLLM, arXiv 2306.08543)."""

from __future__ import annotations

import torch

from fastdraft_hf.train.objectives import register_term
from fastdraft_hf.train.objectives.base import Pair, Term


@register_term
class ReverseKL(Term):
    """``rkl`` = Σ q (log q − log p): the draft keeps to what the target is likely to say.

    Where the stored mass of the rest is zero its logarithm is floored (`TopK`), so the term stays
    finite.
    """

    name = "rkl"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        # d/dlog q = q (log q − log p + 1); the 1 cancels.
        difference = pair.log_q - pair.log_p
        return (pair.q * difference).sum(-1), pair.slope_of(difference)

    def reference(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)
