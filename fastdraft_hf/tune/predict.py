"""From the times of passes and an acceptance to tokens a second.

A round of speculative decoding with γ drafted tokens is γ passes of the draft and one of the
target over γ + 1 tokens, and what the loop does between them:

    t_round(γ) = t_first + (γ - 1)·t_next + t_verify(γ + 1) + t_outside(γ) + f·t_catch_up

The first pass of a round finds the draft's weights gone from the caches of the CPU, since the
target was read in between, and costs more than the next ones. After a block that was accepted
whole, a share f of the rounds, it reads two tokens. With an acceptance of α at every place and
independently, a round emits

    τ(α, γ) = (1 - α^(γ+1)) / (1 - α)

tokens (Leviathan et al. 2023, arXiv 2211.17192, equation 1) and f = α^γ. The prompt is apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def expected_block_efficiency(acceptance: float, num_assistant_tokens: int) -> float:
    """Return τ, tokens a round emits, for an independent acceptance α and γ."""
    return sum(acceptance**place for place in range(num_assistant_tokens + 1))


def expected_acceptance_rate(acceptance: float, num_assistant_tokens: int) -> float:
    """Return accepted / drafted tokens: (τ - 1) / γ."""
    accepted = expected_block_efficiency(acceptance, num_assistant_tokens) - 1
    return accepted / num_assistant_tokens


def acceptance_of_rate(rate: float, num_assistant_tokens: int) -> float:
    """Return the α whose acceptance rate at γ is ``rate`` (from 0 to 1), by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if expected_acceptance_rate(middle, num_assistant_tokens) < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@dataclass(frozen=True)
class RoundCost:
    """Seconds of the parts of a round.

    Attributes:
        first: the draft's first pass of a round.
        next: each further one.
        catch_up: how much longer the first is over two tokens.
        verify: γ -> the target's pass over γ + 1 tokens.
        outside: γ -> all of a round that is no pass of a model.
    """

    first: float
    next: float
    catch_up: float
    verify: Mapping[int, float]
    outside: Mapping[int, float]

    def draft(self, num_assistant_tokens: int) -> float:
        """Return the seconds of a round's passes of the draft, without catching up."""
        return self.first + (num_assistant_tokens - 1) * self.next

    def seconds(self, num_assistant_tokens: int, whole: float = 0.0) -> float:
        """Return the seconds of a round.

        Args:
            num_assistant_tokens: γ.
            whole: share of rounds whose block was accepted whole.
        """
        gamma = num_assistant_tokens
        passes = self.draft(gamma) + self.verify[gamma]
        return passes + self.outside[gamma] + whole * self.catch_up


@dataclass(frozen=True)
class Acceptance:
    """What a draft's rounds give.

    Attributes:
        alpha: an independent acceptance; of a probe, the one that fits best at the largest γ.
        efficiency: γ -> block efficiency where it was measured; else it follows from alpha.
    """

    alpha: float
    efficiency: Mapping[int, float] | None = None

    def block_efficiency(self, num_assistant_tokens: int) -> float:
        if self.efficiency is not None:
            return self.efficiency[num_assistant_tokens]
        return expected_block_efficiency(self.alpha, num_assistant_tokens)

    def whole(self, num_assistant_tokens: int) -> float:
        """Return the share of rounds whose block is accepted whole."""
        return float(self.alpha**num_assistant_tokens)

    @classmethod
    def of_efficiencies(cls, efficiency: Mapping[int, float]) -> Acceptance:
        """Return the acceptance of block efficiencies that were measured, by γ."""
        gamma = max(efficiency)
        alpha = acceptance_of_rate((efficiency[gamma] - 1) / gamma, gamma)
        return cls(alpha, dict(efficiency))


def predict(cost: RoundCost, acceptance: Acceptance, num_assistant_tokens: int) -> float:
    """Return tokens a second after the prompt."""
    gamma = num_assistant_tokens
    return acceptance.block_efficiency(gamma) / cost.seconds(gamma, acceptance.whole(gamma))


@dataclass(frozen=True)
class Law:
    """How the time of a draft's pass depends on its shape, at one budget of parameters.

    Least squares of t = base + layer·layers + width·hidden_size over the designs.

    Attributes:
        base, layer, width: seconds; of the intercept, of a layer, of a unit of width.
        over_layers, over_widths: the two effects over the range of designs, seconds.
        mean: of the designs' times, seconds.
        explained: R² of the fit.
        separable: whether widths vary enough beside depths to tell the two apart.
    """

    base: float
    layer: float
    width: float
    over_layers: float
    over_widths: float
    mean: float
    explained: float
    separable: bool

    @property
    def holds(self) -> bool | None:
        """Whether latency grows with layers and hardly with width; ``None`` when not told."""
        if not self.separable:
            return None
        return self.over_layers > 0.1 * self.mean and self.over_layers > 3 * abs(self.over_widths)

    def sentence(self) -> str:
        """Return the law of the paper (section 3.1) as it is on this machine, in words."""
        if not self.separable:
            return (
                "Whether latency grows with layers or with width cannot be told: these designs "
                "do not vary in both."
            )
        facts = (
            f"from the fewest layers to the most a pass takes {1e3 * self.over_layers:+.2f} ms "
            f"({self.over_layers / self.mean:+.0%} of the mean), from the narrowest to the widest "
            f"{1e3 * self.over_widths:+.2f} ms ({self.over_widths / self.mean:+.0%}); "
            f"{1e3 * self.layer:.3f} ms a layer, R² {self.explained:.2f}"
        )
        begin = (
            "The paper's law holds here: latency grows with layers, hardly with width"
            if self.holds
            else "This machine differs from the paper's law (layers cost, width hardly)"
        )
        return f"{begin}: {facts}."


def fit_law(points: Sequence[tuple[int, int, float]]) -> Law:
    """Fit the law to (layers, width, seconds) of designs of one budget."""
    import numpy

    layers, widths, seconds = (numpy.array(column, float) for column in zip(*points, strict=True))
    columns = numpy.stack([numpy.ones_like(layers), layers, widths], 1)
    # Centred, so that the condition number says whether the two effects can be told apart.
    shape = columns[:, 1:] - columns[:, 1:].mean(0)
    spread = shape.std(0)
    separable = len(points) > 3 and bool((spread > 0).all())
    if separable:
        correlation = numpy.corrcoef(shape.T)[0, 1]
        separable = bool(abs(correlation) < 0.98)
    (base, layer, width), *_ = numpy.linalg.lstsq(columns, seconds, rcond=None)
    left = seconds - columns @ numpy.array([base, layer, width])
    total = ((seconds - seconds.mean()) ** 2).sum()
    return Law(
        base=float(base),
        layer=float(layer),
        width=float(width),
        over_layers=float(layer * (layers.max() - layers.min())),
        over_widths=float(width * (widths.max() - widths.min())),
        mean=float(seconds.mean()),
        explained=float(1 - (left**2).sum() / total) if total else 1.0,
        separable=separable,
    )
