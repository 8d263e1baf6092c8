"""Total variation distance: one minus the expected acceptance (Zhou et al. 2023, DistillSpec)."""

from __future__ import annotations

import torch

from fastdraft_hf.train.objectives import register_term
from fastdraft_hf.train.objectives.base import Pair, Term


@register_term
class TotalVariation(Term):
    """``tvd`` = ½ Σ |p − q| = 1 − α (arXiv 2310.08461, section 3)."""

    name = "tvd"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.5 * (pair.p - pair.q).abs().sum(-1), pair.rejection_slope

    def reference(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return 0.5 * (p - q).abs().sum(-1)
