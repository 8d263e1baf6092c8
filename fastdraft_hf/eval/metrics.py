"""Acceptance rate, block efficiency and MBSU over decoding records, with bootstrap intervals.

Definitions as in FastDraft (arXiv 2411.11055, section 4): with γ tokens drafted a round,

- acceptance rate = accepted draft tokens / drafted tokens,
- block efficiency τ = tokens emitted / forward passes of the target, at most γ + 1,
- MBSU = τ / (c·γ + 1) with c = draft parameters / target parameters: the speed-up of a machine
  whose time is the reading of weights.

All are ratios of sums over records, not means of ratios, so long answers weigh more than short
ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastdraft_hf.decode.records import DecodingRecord

Records = Sequence[DecodingRecord]
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def triple(self) -> list[float]:
        """Return [value, low, high], as results hold it."""
        return [self.value, self.low, self.high]

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def acceptance_rate(records: Records) -> float:
    """Return accepted / drafted tokens; 0 when nothing was drafted."""
    drafted = sum(r.drafted for r in records)
    return sum(r.accepted for r in records) / drafted if drafted else 0.0


def block_efficiency(records: Records) -> float:
    """Return emitted tokens per forward pass of the target; 1 when there were none."""
    passes = sum(r.target_passes for r in records)
    return sum(r.new_tokens for r in records) / passes if passes else 1.0


def mbsu(efficiency: float, cost_ratio: float, num_assistant_tokens: int) -> float:
    """Return the memory-bound speed-up.

    Args:
        efficiency: block efficiency τ.
        cost_ratio: c, draft parameters over target parameters.
        num_assistant_tokens: γ.
    """
    return efficiency / (cost_ratio * num_assistant_tokens + 1)


def tokens_per_second(records: Records) -> float:
    """Return new tokens over wall-clock seconds, prompt processing included."""
    seconds = sum(r.seconds for r in records)
    return sum(r.new_tokens for r in records) / seconds if seconds else 0.0


def acceptance_by_position(records: Records) -> list[float]:
    """Return, for each place in a drafted block, the share of blocks accepted up to there.

    Only rounds that drafted so far count; records without rounds are left out.
    """
    longest = max((d for r in records for d, _ in r.rounds), default=0)
    shares = []
    for position in range(longest):
        rounds = [(d, a) for r in records for d, a in r.rounds if d > position]
        shares.append(sum(a > position for _, a in rounds) / len(rounds))
    return shares


def bootstrap(
    records: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return ``statistic`` with a 95% percentile bootstrap interval over records (prompts)."""
    value = statistic(records)
    if len(records) < 2:
        return Estimate(value, value, value)
    rng = random.Random(seed)
    drawn = sorted(statistic(rng.choices(records, k=len(records))) for _ in range(samples))
    return Estimate(value, drawn[int(0.025 * samples)], drawn[int(0.975 * samples)])


def speed_ratio(assisted: Records, alone: Records, *, seed: int = 0) -> Estimate:
    """Return tokens/s with a draft over tokens/s without, the same prompts paired.

    Raises:
        ValueError: the two lists are not of the same prompts in the same order.
    """
    pairs = list(zip(assisted, alone, strict=True))
    if any((a.task, a.key) != (b.task, b.key) for a, b in pairs):
        raise ValueError("speed_ratio needs the same prompts in the same order")

    def ratio(indices: Sequence[int]) -> float:
        chosen = [pairs[i] for i in indices]
        with_draft = tokens_per_second([a for a, _ in chosen])
        return with_draft / max(tokens_per_second([b for _, b in chosen]), 1e-12)

    everything = range(len(pairs))
    value = ratio(everything)
    rng = random.Random(seed)
    drawn = sorted(ratio(rng.choices(everything, k=len(pairs))) for _ in range(1000))
    return Estimate(value, drawn[25], drawn[975])
