"""Negative log of the expected acceptance (Samarin et al. 2026, LK losses, arXiv 2602.23881)."""

from __future__ import annotations

import torch

from fastdraft_hf.train.objectives import register_term
from fastdraft_hf.train.objectives.base import Pair, Term

# α is at least the mass of one token, so this is met only by distributions that share nothing.
_LEAST = 1e-12


@register_term
class NegativeLogAcceptance(Term):
    """``nla`` = −log α with α = Σ min(p, q).

    It has the minimum of ``tvd``, and a gradient 1/α times as steep: where the draft is far off,
    total variation hardly moves it.
    """

    name = "nla"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = pair.acceptance.clamp(min=_LEAST)
        return -alpha.log(), pair.rejection_slope / alpha[:, None]

    def reference(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return -torch.minimum(p, q).sum(-1).clamp(min=_LEAST).log()
