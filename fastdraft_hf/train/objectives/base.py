"""What a term of the objective is: a divergence between the target's and the draft's distribution.

Every term is computed over B outcomes, and B is either the whole vocabulary (an online target) or
the k stored tokens and one bucket that holds the rest of the mass (`TopK`). Merging outcomes never
raises a divergence (data processing inequality), so over buckets

- ``kl``, ``rkl``, ``jsd``, ``tvd`` are lower bounds of the divergence of the full distributions,
- the acceptance α is an upper bound, and so ``nla`` is a lower bound,
- ``lk_hybrid`` mixes two lower bounds; its weight comes from the bounded α,
- ``ce`` reads only the label and is exact.

A bound is exact when no mass is left over, and otherwise when the merged tokens would have told
nothing more: for ``kl``, ``rkl`` and ``jsd`` when p/q is the same for all of them, for ``tvd``,
``nla`` and α already when p ≥ q for all of them or p ≤ q for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar

import torch


class Pair:
    """The two distributions over the same B outcomes, and what several terms ask of them.

    Attributes:
        log_p: [N, B], log-probabilities of the target, finite.
        log_q: [N, B], log-probabilities of the draft, finite.
    """

    def __init__(self, log_p: torch.Tensor, log_q: torch.Tensor) -> None:
        self.log_p, self.log_q = log_p, log_q

    @cached_property
    def p(self) -> torch.Tensor:
        """[N, B]"""
        return self.log_p.exp()

    @cached_property
    def q(self) -> torch.Tensor:
        """[N, B]"""
        return self.log_q.exp()

    @cached_property
    def acceptance(self) -> torch.Tensor:
        """[N], α = Σ min(p, q), the chance that a token drafted here is accepted.

        Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5.
        """
        return torch.minimum(self.p, self.q).sum(-1)

    def slope_of(self, factor: torch.Tensor) -> torch.Tensor:
        """Return ``q · (factor − factor at the most probable outcome of q)`` [N, B].

        A constant times q cancels in the gradient by the logits. Taken so that the most probable
        outcome has none, nothing large is left to cancel in float32 where the draft is nearly
        certain.
        """
        return self.q * (factor - factor.gather(1, self.log_q.argmax(-1, keepdim=True)))

    @cached_property
    def rejection_slope(self) -> torch.Tensor:
        """[N, B], the derivative of 1 − α by ``log q``: −q where q < p, else 0, up to `slope_of`.

        Where p = q there is a kink, and half of it is the subgradient that autograd takes as well.
        """
        return self.slope_of((self.q - self.p).sign() / 2)


class Term(ABC):
    """One named summand of the objective."""

    name: ClassVar[str]

    @abstractmethod
    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the term's values [N] and its derivatives by ``log q`` [N, B].

        The derivatives are taken with every ``log q`` on its own; that the probabilities sum to
        one is the caller's business. A constant times ``q`` may be left out, since it cancels
        there.
        """

    @abstractmethod
    def reference(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Return the values [N] by the plain formula over probabilities [N, B].

        Differentiable by autograd; tests compare `value_and_slope` with it.
        """
