"""The objective of training: a weighted sum of terms that compare draft and teacher.

Every term is computed over B outcomes, and B is either the whole vocabulary (an online teacher) or
the k stored tokens and one bucket with the mass of the tail (`TopK`). Merging outcomes never raises
a divergence (data processing inequality), so over buckets

- ``kl``, ``rkl``, ``jsd``, ``tvd`` are lower bounds of the divergence of the full distributions,
- the acceptance α is an upper bound, and so ``nla`` is a lower bound,
- ``lk_hybrid`` mixes two lower bounds; its weight comes from the bounded α,
- ``ce`` reads only the label and is exact.

A bound is exact when the tail has no mass. It is exact too for ``kl``, ``rkl`` and ``jsd`` when p/q
is the same for all merged tokens, and for ``tvd``, ``nla`` and α when p ≥ q for all of them or
p ≤ q for all of them.

A new loss is a `Term` under ``@register_term``, in any package; docs/objectives.md has an example.
Shapes: N tokens, B outcomes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, TypeVar

import torch

from fastdraft_hf._errors import FastDraftError, nearest


class Pair:
    """Log-probabilities [N, B] of the teacher, `log_p`, and of the draft, `log_q`, all finite."""

    def __init__(self, log_p: torch.Tensor, log_q: torch.Tensor) -> None:
        self.log_p, self.log_q = log_p, log_q

    @cached_property
    def p(self) -> torch.Tensor:
        return self.log_p.exp()

    @cached_property
    def q(self) -> torch.Tensor:
        return self.log_q.exp()

    @cached_property
    def acceptance(self) -> torch.Tensor:
        """[N], α = Σ min(p, q), the chance that a token drafted here is accepted.

        Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5.
        """
        return torch.minimum(self.p, self.q).sum(-1)

    def slope_of(self, factor: torch.Tensor) -> torch.Tensor:
        """Return ``q · (factor − factor at the most probable outcome of q)`` [N, B].

        A constant times q cancels in the gradient by the logits. With this one nothing large is
        left to cancel in float32 where the draft is nearly certain.
        """
        return self.q * (factor - factor.gather(1, self.log_q.argmax(-1, keepdim=True)))

    @cached_property
    def rejection_slope(self) -> torch.Tensor:
        """[N, B], the derivative of 1 − α by ``log q``: −q where q < p, half of it at p = q."""
        return self.slope_of((self.q - self.p).sign() / 2)


class Term(ABC):
    """One named summand of the objective."""

    name: ClassVar[str]

    @abstractmethod
    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the term's values [N] and its derivatives by ``log q`` [N, B].

        The derivatives treat every ``log q`` as independent. A constant times ``q`` may be left
        out, because it cancels in the gradient by the logits.
        """


T = TypeVar("T", bound=type[Term])

_TERMS: dict[str, Term] = {}

# The mixtures that the paper compares for alignment (arXiv 2411.11055, section 4.4).
PRESETS: dict[str, dict[str, float]] = {
    "ce_kl": {"ce": 0.5, "kl": 0.5},
    "ce_tvd": {"ce": 0.5, "tvd": 0.5},
}


def register_term(cls: T) -> T:
    """Make a `Term` known by its name.

    Raises:
        FastDraftError: another term has the name.
    """
    known = type(_TERMS.get(cls.name, cls()))
    # The same class may be registered again when its module is reloaded.
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise FastDraftError(f"a term named '{cls.name}' is already registered")
    _TERMS[cls.name] = cls()
    return cls


@register_term
class CrossEntropy(Term):
    """``ce`` = −log q at the label: pre-training, and sequence-level knowledge distillation.

    On the target's completions it is FastDraft's alignment (arXiv 2411.11055, section 3.3). The
    head computes it from the labels and does not call `value_and_slope`.
    """

    name = "ce"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return -(pair.p * pair.log_q).sum(-1), -pair.p


@register_term
class ForwardKL(Term):
    """``kl`` = Σ p (log p − log q): the draft covers whatever the teacher may say.

    Hinton et al. 2015, arXiv 1503.02531; the paper's KL (arXiv 2411.11055).
    """

    name = "kl"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return (pair.p * (pair.log_p - pair.log_q)).sum(-1), -pair.p


@register_term
class ReverseKL(Term):
    """``rkl`` = Σ q (log q − log p): the draft keeps to what the teacher is likely to say.

    An empty tail is floored (`TopK`), so the term stays finite. Gu et al. 2023, MiniLLM, arXiv
    2306.08543.
    """

    name = "rkl"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        # d/dlog q = q (log q − log p + 1); the 1 cancels.
        difference = pair.log_q - pair.log_p
        return (pair.q * difference).sum(-1), pair.slope_of(difference)


@register_term
class JensenShannon(Term):
    """``jsd`` = ½ KL(p‖m) + ½ KL(q‖m) with m = ½ (p + q); between 0 and log 2.

    Lin 1991; for distillation Agarwal et al. 2023, arXiv 2306.13649.
    """

    name = "jsd"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        log_m = torch.logaddexp(pair.log_p, pair.log_q) - math.log(2)
        # d/dlog q = ½ q (log q − log m): what comes from m and from q's own factor cancels.
        difference = 0.5 * (pair.log_q - log_m)
        values = (0.5 * pair.p * (pair.log_p - log_m) + pair.q * difference).sum(-1)
        return values, pair.slope_of(difference)


@register_term
class TotalVariation(Term):
    """``tvd`` = ½ Σ |p − q| = 1 − α.

    Zhou et al. 2023, DistillSpec, arXiv 2310.08461, section 3.
    """

    name = "tvd"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.5 * (pair.p - pair.q).abs().sum(-1), pair.rejection_slope


@register_term
class NegativeLogAcceptance(Term):
    """``nla`` = −log α with α = Σ min(p, q).

    Its gradient is that of ``tvd`` divided by α, so that it does not vanish where the draft is far
    off. Samarin et al. 2026, LK losses, arXiv 2602.23881.
    """

    name = "nla"
    # α is at least the mass of one token, so only distributions that share nothing reach this.
    least = 1e-12

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = pair.acceptance.clamp(min=self.least)
        return -alpha.log(), pair.rejection_slope / alpha[:, None]


@register_term
class LKHybrid(Term):
    """``lk_hybrid`` = λ·KL + (1 − λ)·TV with λ = exp(−3α), α and λ of each token, λ detached.

    KL has a useful gradient where the draft is far off; total variation, which is the acceptance,
    takes over as α grows. Samarin et al. 2026, arXiv 2602.23881.
    """

    name = "lk_hybrid"
    decay = 3.0

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        share = torch.exp(-self.decay * pair.acceptance)
        kl, kl_slope = ForwardKL().value_and_slope(pair)
        tv, tv_slope = TotalVariation().value_and_slope(pair)
        slope = share[:, None] * kl_slope + (1 - share[:, None]) * tv_slope
        return share * kl + (1 - share) * tv, slope


class Objective:
    """A weighted sum of terms.

    Args:
        weights: weight by name of term (``{"ce": 0.5, "kl": 0.5}``), or the name of a term or a
            preset. Weights are used as they are; they need not sum to one.

    Raises:
        FastDraftError: an unknown name, or a weight that is not a number above 0.
    """

    def __init__(self, weights: Mapping[str, float] | str) -> None:
        if isinstance(weights, str):
            known = {**{name: {name: 1.0} for name in _TERMS}, **PRESETS}
            if weights not in known:
                raise FastDraftError(
                    f"objective: there is no '{weights}'{nearest(weights, known)}; terms: "
                    f"{', '.join(_TERMS)}; presets: {', '.join(PRESETS)}"
                )
            weights = known[weights]
        if not weights:
            raise FastDraftError(f"objective: at least one term is needed, of {', '.join(_TERMS)}")
        for name, weight in weights.items():
            if name not in _TERMS:
                raise FastDraftError(
                    f"objective.{name}: there is no such term{nearest(name, _TERMS)}; terms: "
                    f"{', '.join(_TERMS)}"
                )
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight <= 0:
                raise FastDraftError(
                    f"objective.{name}: a weight above 0 is needed, got {weight!r}"
                )
        self.weights = {name: float(weight) for name, weight in weights.items()}

    @property
    def needs_distribution(self) -> bool:
        """Whether labels alone are not enough."""
        return bool(self.divergences)

    @property
    def label_weight(self) -> float:
        """The weight of cross-entropy on the labels."""
        return self.weights.get("ce", 0.0)

    @property
    def divergences(self) -> dict[str, tuple[float, Term]]:
        """Weight and term of everything that compares two distributions."""
        return {
            name: (weight, _TERMS[name]) for name, weight in self.weights.items() if name != "ce"
        }

    def __repr__(self) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
