"""From the time of a round and an acceptance to tokens per second.

A round drafts γ tokens and verifies them in one pass of the target. With an acceptance of α at
every position, independently, it emits

    τ(α, γ) = 1 + α + … + α^γ = (1 - α^(γ+1)) / (1 - α)

tokens (Leviathan et al. 2023, arXiv 2211.17192, equation 1), so the speed after the prompt is
τ(α, γ) / t(γ), where t(γ) is the measured time of a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def expected_block_efficiency(alpha: float, num_assistant_tokens: int) -> float:
    """Return τ, the tokens per round at an acceptance α and γ."""
    return sum(alpha**position for position in range(num_assistant_tokens + 1))


def expected_acceptance_rate(alpha: float, num_assistant_tokens: int) -> float:
    """Return accepted / drafted tokens, (τ - 1) / γ."""
    return (expected_block_efficiency(alpha, num_assistant_tokens) - 1) / num_assistant_tokens


def acceptance_of_rate(rate: float, num_assistant_tokens: int) -> float:
    """Return the α whose acceptance rate at γ is ``rate`` (0 to 1), by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if expected_acceptance_rate(middle, num_assistant_tokens) < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@dataclass(frozen=True)
class Acceptance:
    """A draft's acceptance.

    Attributes:
        alpha: chance that a drafted token is accepted; of a probe, what fits its largest γ.
        efficiency: γ -> block efficiency, where it was measured; otherwise it follows from α.
    """

    alpha: float
    efficiency: Mapping[int, float] | None = None

    def block_efficiency(self, num_assistant_tokens: int) -> float:
        if self.efficiency is not None:
            return self.efficiency[num_assistant_tokens]
        return expected_block_efficiency(self.alpha, num_assistant_tokens)

    @classmethod
    def of_efficiencies(cls, efficiency: Mapping[int, float]) -> Acceptance:
        """Return the acceptance of block efficiencies measured by γ."""
        gamma = max(efficiency)
        return cls(acceptance_of_rate((efficiency[gamma] - 1) / gamma, gamma), dict(efficiency))


def fit_law(points: Sequence[tuple[int, int, float]]) -> dict[str, Any]:
    """Fit t = base + layer·layers + width·hidden_size to drafts of one parameter budget.

    The paper (section 3.1) finds that latency grows with layers and hardly with width.

    Args:
        points: (layers, width, seconds of a drafted token) of each draft.

    Returns:
        ``layer`` and ``width`` in seconds per unit, ``explained`` (R²), ``holds`` (``None`` if the
        designs do not vary in both) and a ``sentence``.
    """
    import numpy

    data = numpy.array(points, float)
    shape, seconds = data[:, :2], data[:, 2]
    ranges = numpy.ptp(shape, axis=0)
    if len(points) < 4 or not ranges.all() or abs(numpy.corrcoef(shape.T)[0, 1]) > 0.98:
        sentence = "These designs do not vary enough in both layers and width to compare the two."
        return {"layer": None, "width": None, "holds": None, "sentence": sentence}
    columns = numpy.column_stack([numpy.ones(len(points)), shape])
    weights = numpy.linalg.lstsq(columns, seconds, rcond=None)[0]
    explained = (
        1 - ((seconds - columns @ weights) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    )
    over = weights[1:] * ranges
    holds = bool(over[0] > 0.1 * seconds.mean() and over[0] > 3 * abs(over[1]))
    begin = "This machine follows" if holds else "This machine differs from"
    sentence = (
        f"{begin} the paper's law (latency grows with layers, hardly with width): from the fewest "
        f"layers to the most a drafted token takes {1e3 * over[0]:+.2f} ms, from the narrowest to "
        f"the widest {1e3 * over[1]:+.2f} ms, of {1e3 * seconds.mean():.2f} ms on average (R² "
        f"{explained:.2f})."
    )
    law = {"layer": float(weights[1]), "width": float(weights[2]), "explained": float(explained)}
    return {**law, "holds": holds, "sentence": sentence}
