"""From the time of a round and an acceptance to tokens per second.

A round drafts γ tokens and verifies them in one pass of the target. With an acceptance of α at
every position, independently, it emits

    τ(α, γ) = 1 + α + … + α^γ = (1 - α^(γ+1)) / (1 - α)

tokens (Leviathan et al. 2023, arXiv 2211.17192, equation 1), so the speed after the prompt is
τ(α, γ) / t(γ), where t(γ) is the measured time of a round.
"""

from __future__ import annotations


def expected_block_efficiency(alpha: float, num_assistant_tokens: int) -> float:
    """Return τ, the tokens per round at an acceptance α and γ."""
    return sum(alpha**position for position in range(num_assistant_tokens + 1))


def acceptance_of_rate(rate: float, num_assistant_tokens: int) -> float:
    """Return the α whose acceptance rate at γ is ``rate`` (0 to 1), by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tokens = expected_block_efficiency(middle, num_assistant_tokens)
        if (tokens - 1) / num_assistant_tokens < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2
