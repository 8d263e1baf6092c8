"""Acceptance rate, block efficiency, MBSU and speed ratios, with bootstrap intervals over prompts.

The definitions are those of FastDraft (arXiv 2411.11055, section 4). With γ tokens drafted per
round:

- acceptance rate = accepted draft tokens / drafted tokens,
- block efficiency τ = emitted tokens / forward passes of the target, at most γ + 1,
- MBSU = τ / (c·γ + 1), with c = draft parameters / target parameters: the speed-up of a machine
  that spends all its time reading weights.

All are ratios of sums over records, not means of ratios: long answers weigh more than short ones.
"""

import bisect
import random
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.expected import ExpectedRounds

Records = Sequence[DecodingRecord]
T = TypeVar("T")
# An answer's totals: counted, or expected.
Counts = DecodingRecord | ExpectedRounds
# The same prompt in two settings.
Pair = tuple[DecodingRecord, DecodingRecord]
# Tokens and seconds of the first of a pair, tokens and seconds of the second.
Row = tuple[float, float, float, float]


class Estimate(NamedTuple):
    """A value with its bootstrap interval (95% unless stated otherwise)."""

    value: float
    low: float
    high: float


def acceptance_rate(records: Sequence[Counts]) -> float:
    """Return accepted / drafted tokens; 0 if nothing was drafted."""
    drafted = sum(r.drafted for r in records)
    return sum(r.accepted for r in records) / drafted if drafted else 0.0


def block_efficiency(records: Sequence[Counts]) -> float:
    """Return emitted tokens per forward pass of the target; 1 if there were no passes."""
    passes = sum(r.target_passes for r in records)
    return sum(r.new_tokens for r in records) / passes if passes else 1.0


def mbsu(efficiency: float, cost_ratio: float, num_assistant_tokens: int) -> float:
    """Return the memory-bound speed-up.

    Args:
        efficiency: block efficiency τ.
        cost_ratio: c, draft parameters / target parameters.
        num_assistant_tokens: γ.
    """
    return efficiency / (cost_ratio * num_assistant_tokens + 1)


def expected_block_efficiency(alpha: float, num_assistant_tokens: int) -> float:
    """Return τ = 1 + α + … + α^γ, where α is the chance that a drafted token is accepted.

    See Leviathan et al. 2023, arXiv 2211.17192, equation 1.
    """
    return sum(alpha**position for position in range(num_assistant_tokens + 1))


def acceptance_of_rate(rate: float, num_assistant_tokens: int) -> float:
    """Return the α whose acceptance rate (τ - 1) / γ is ``rate`` (0 to 1), by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tokens = expected_block_efficiency(middle, num_assistant_tokens)
        if (tokens - 1) / num_assistant_tokens < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def tokens_per_second(records: Records) -> float:
    """Return new tokens per second of wall clock, prompt processing included."""
    seconds = sum(r.seconds for r in records)
    return sum(r.new_tokens for r in records) / seconds if seconds else 0.0


def acceptance_by_position(records: Records) -> list[float]:
    """Return, for each position of a drafted block, the share of blocks accepted up to it.

    A round counts at a position only if it drafted that far. Records without rounds do not count.
    """
    rounds = [one for r in records for one in r.rounds]
    shares = []
    for position in range(max((drafted for drafted, _ in rounds), default=0)):
        reached = [accepted for drafted, accepted in rounds if drafted > position]
        shares.append(sum(accepted > position for accepted in reached) / len(reached))
    return shares


# Tokens of the text so far, prompt included, that end a band of `acceptance_by_length`.
BANDS = (256, 1024, 4096, 8192)


def acceptance_by_length(
    records: Records, prompts: Sequence[int]
) -> dict[str, tuple[int, int, float]]:
    """Return drafted and accepted tokens and the acceptance rate by the length of the text.

    A round belongs to the band of the text before it, prompt included: ``0-256``, ``256-1024`` and
    so on. Bands without a drafted token are left out, as are records without rounds.

    Args:
        prompts: tokens of each record's prompt.
    """
    counts: dict[str, list[int]] = {}
    starts, ends = (0, *BANDS), (*BANDS, None)
    names = [f"{a}-{b}" if b else f"{a}-" for a, b in zip(starts, ends, strict=True)]
    for record, length in zip(records, prompts, strict=True):
        for drafted, accepted in record.rounds:
            found = counts.setdefault(names[bisect.bisect(BANDS, length)], [0, 0])
            found[0] += drafted
            found[1] += accepted
            length += accepted + 1
    return {
        name: (drafted, accepted, accepted / drafted)
        for name in names
        for drafted, accepted in [counts.get(name, (0, 0))]
        if drafted
    }


def bootstrap(
    records: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return ``statistic`` with its percentile bootstrap interval over records (prompts)."""
    value = statistic(records)
    if len(records) < 2 or not samples:
        return Estimate(value, value, value)
    rng = random.Random(seed)
    drawn = sorted(statistic(rng.choices(records, k=len(records))) for _ in range(samples))
    low, high = int((1 - level) / 2 * samples), int((1 + level) / 2 * samples)
    return Estimate(value, drawn[low], drawn[min(high, samples - 1)])


def paired_row(pair: Pair) -> Row:
    """Return tokens and seconds of both records; refuse those of two prompts."""
    a, b = pair
    if (a.task, a.key) != (b.task, b.key):
        raise ValueError("a ratio needs pairs of the same prompt")
    return a.new_tokens, a.seconds, b.new_tokens, b.seconds


def paired_ratio(pairs: Sequence[Pair]) -> Estimate:
    """Return tokens/s of the first over tokens/s of the second of each pair, with its interval.

    Raises:
        ValueError: the two records of a pair are of different prompts.
    """
    return ratio_of_rows([paired_row(pair) for pair in pairs])


def ratio_of_rows(rows: Sequence[Row]) -> Estimate:
    """Return `paired_ratio` of the pairs' rows."""

    def ratio(rows: Sequence[Row]) -> float:
        new, seconds, other_new, other_seconds = map(sum, zip(*rows, strict=True))
        return (new / max(seconds, 1e-12)) / max(other_new / max(other_seconds, 1e-12), 1e-12)

    return bootstrap(rows, ratio, level=1 - 2 * _tail(len(rows)))


def _tail(count: int) -> float:
    """Return the share of resamples outside a 95% interval, on each side.

    A percentile interval over a few prompts is too narrow: it divides by n instead of n - 1 and
    assumes the normal distribution instead of Student's t. The expanded percentile interval
    (Hesterberg 2015, arXiv 1411.5279) is as wide as a t interval: with eight prompts 0.6% of the
    resamples lie outside on each side, with four next to none.
    """
    if count < 2:
        return 0.0
    z, degrees = 1.959964, count - 1
    # Student's t, expanded in 1/degrees. Too small below three degrees, where next to no resample
    # lies outside anyway.
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return statistics.NormalDist().cdf(-t * (count / degrees) ** 0.5)
