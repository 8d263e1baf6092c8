"""The acceptance rate a plan reckons with, and what follows from it."""

from __future__ import annotations

import math

from fastdraft_hf.recipe import Recipe

# Acceptance rates (γ = 3) that are known: the quickstart's after 0.64M tokens, and the paper's mean
# of Dolly and HumanEval for Phi-3-mini 50M after 12.5B.
KNOWN_ACCEPTANCE = ((0.64e6, 0.134), (12.5e9, 0.466))


def assumed_acceptance(recipe: Recipe) -> tuple[float, str]:
    """Return an acceptance rate at γ = 3 for the recipe's token budget, and where it is from."""
    tokens = sum(stage.max_train_tokens for stage in recipe.training_stages().values())
    if not tokens:
        return KNOWN_ACCEPTANCE[0][1], "the quickstart's"
    (few, low), (many, high) = KNOWN_ACCEPTANCE
    share = (math.log(tokens) - math.log(few)) / (math.log(many) - math.log(few))
    value = low + (high - low) * min(1.0, max(0.0, share))
    return round(value, 3), (
        f"between the quickstart's {low} at 0.64M tokens and the paper's {high} at 12.5B (mean of "
        "Dolly and HumanEval), by the logarithm of the budget"
    )


def chance_of(acceptance_rate: float, num_assistant_tokens: int) -> float:
    """Return the chance α a place that gives this share of accepted tokens at γ.

    A place is reached only if those before it were accepted, so the share is
    (α + α² + … + α^γ) / γ.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        share = sum(middle**k for k in range(1, num_assistant_tokens + 1)) / num_assistant_tokens
        low, high = (middle, high) if share < acceptance_rate else (low, middle)
    return (low + high) / 2


def block_efficiency(chance: float, num_assistant_tokens: int) -> float:
    """Return τ = 1 + α + … + α^γ."""
    return sum(chance**k for k in range(num_assistant_tokens + 1))
