from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.metrics import (
    acceptance_by_length,
    acceptance_by_position,
    acceptance_of_rate,
    acceptance_rate,
    block_efficiency,
    bootstrap,
    expected_block_efficiency,
    mbsu,
)

MakeRecord = Callable[..., DecodingRecord]

# A round drafts up to γ = 5 tokens and accepts some of them.
ROUND = st.integers(0, 5).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d)))
ANSWERS = st.lists(st.lists(ROUND, min_size=1, max_size=8), min_size=1, max_size=6)


def test_acceptance_is_a_ratio_of_sums(make_record: MakeRecord) -> None:
    short, long = make_record([(3, 3)]), make_record([(3, 0), (3, 0), (3, 1)])
    assert acceptance_rate([short]) == 1.0
    assert acceptance_rate([long]) == pytest.approx(1 / 9)
    assert acceptance_rate([short, long]) == pytest.approx(4 / 12)
    assert acceptance_rate([]) == 0.0
    assert acceptance_rate([make_record()]) == 0.0


def test_block_efficiency_is_tokens_a_target_pass(make_record: MakeRecord) -> None:
    assert block_efficiency([make_record([(3, 3)]), make_record([(3, 0), (3, 1)])]) == 7 / 3
    alone = make_record(tokens=[1, 2, 3], target_passes=3)
    assert block_efficiency([alone]) == 1.0
    assert block_efficiency([]) == 1.0


def test_mbsu_is_the_papers_formula() -> None:
    # c = 0.08, γ = 3: a round costs 1.24 target passes.
    assert mbsu(2.48, 0.08, 3) == pytest.approx(2.0)


def test_acceptance_by_position(make_record: MakeRecord) -> None:
    records = [make_record([(3, 3), (3, 1)]), make_record([(3, 0), (1, 1)]), make_record()]
    # First position: accepted in three of four rounds; second and third: one of the three that
    # drafted so far.
    assert acceptance_by_position(records) == [3 / 4, 1 / 3, 1 / 3]
    assert acceptance_by_position([]) == []


def test_acceptance_by_text_length(make_record: MakeRecord) -> None:
    # 250 + 4 tokens are still in the first band, 250 + 4 + 4 are not.
    records = [make_record([(3, 3), (3, 3), (3, 0)]), make_record([(4, 1)]), make_record()]
    found = acceptance_by_length(records, [250, 9000, 10])
    assert found == {"0-256": (6, 6, 1.0), "256-1024": (3, 0, 0.0), "8192-": (4, 1, 0.25)}
    assert acceptance_by_length([], []) == {}


def spread(make_record: MakeRecord, count: int) -> list[DecodingRecord]:
    """Make ``count`` records whose acceptance runs over 0, 1/4, ... 1 in equal parts."""
    return [make_record([(4, n % 5)], key=str(n)) for n in range(count)]


def test_a_bootstrap_interval_holds_its_value_and_narrows(make_record: MakeRecord) -> None:
    few = bootstrap(spread(make_record, 10), acceptance_rate)
    many = bootstrap(spread(make_record, 160), acceptance_rate)
    for estimate in (few, many):
        assert estimate.value == pytest.approx(0.5)
        assert estimate.low < estimate.value < estimate.high
    # The standard error of a mean falls with the root of the count: sixteen times, to a quarter.
    assert (many.high - many.low) / (few.high - few.low) == pytest.approx(0.25, rel=0.25)
    one = bootstrap([make_record([(4, 1)])], acceptance_rate)
    assert (one.value, one.low, one.high) == (0.25, 0.25, 0.25)  # no interval
    # 1.96 standard errors: the values' standard deviation is sqrt(2)/4.
    assert many.high - many.low == pytest.approx(2 * 1.96 * (2**0.5 / 4) / 160**0.5, rel=0.15)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.3, 1), (0.45, 3), (0.97, 8)])
def test_expected_block_efficiency_is_a_geometric_sum(alpha: float, gamma: int) -> None:
    closed = (1 - alpha ** (gamma + 1)) / (1 - alpha)
    assert expected_block_efficiency(alpha, gamma) == pytest.approx(closed)


@given(st.floats(0, 1), st.integers(1, 12))
def test_an_acceptance_comes_back_from_its_rate(alpha: float, gamma: int) -> None:
    tokens = expected_block_efficiency(alpha, gamma)
    found = acceptance_of_rate((tokens - 1) / gamma, gamma)
    assert expected_block_efficiency(found, gamma) == pytest.approx(tokens, abs=1e-8)
