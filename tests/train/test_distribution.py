"""Stored distributions: what top-k keeps, what float16 costs, logits from hidden states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft_hf.data.target_logits import FLOOR, top_k_of
from fastdraft_hf.train.distribution import TopK

TEMPERATURES = [0.3, 0.6, 1.0, 2.0]


def random_logits(n: int, v: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * spread


@settings(max_examples=100)
@given(
    n=st.integers(0, 9),
    v=st.sampled_from([1, 2, 3, 17, 200, 3000]),
    share=st.floats(0, 1),
    temperature=st.sampled_from(TEMPERATURES),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_top_k_of_is_a_distribution_of_the_most_probable(
    n: int, v: int, share: float, temperature: float, ties: bool, seed: int
) -> None:
    k = max(1, round(share * v))
    logits = random_logits(n, v, seed)
    if ties:
        logits = logits.round()
    ids, log_probs, tail = top_k_of(logits, k, temperature)
    assert (ids.shape, log_probs.shape, tail.shape) == ((n, k), (n, k), (n,))
    exact = torch.log_softmax(logits.double() / temperature, -1)
    torch.testing.assert_close(log_probs.double(), exact.gather(1, ids), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(log_probs.double(), exact.topk(k, -1).values, rtol=1e-6, atol=2e-6)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert (log_probs.diff(dim=-1) <= 0).all()  # the most probable comes first
    if k == v:
        assert (tail == FLOOR).all()
    else:
        left = exact.scatter(1, ids, float("-inf")).logsumexp(-1)
        torch.testing.assert_close(tail.double(), left, rtol=1e-6, atol=2e-6)
    total = log_probs.double().exp().sum(-1) + tail.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)


@given(
    n=st.integers(1, 9),
    v=st.sampled_from([1, 2, 17, 200]),
    share=st.floats(0, 1),
    temperature=st.sampled_from(TEMPERATURES),
    seed=st.integers(0, 10**6),
)
def test_float16_costs_half_a_unit_in_the_last_place(
    n: int, v: int, share: float, temperature: float, seed: int
) -> None:
    """Eleven bits of a logarithm: every probability within |log p| / 2048, normalised again."""
    k = max(1, round(share * v))
    ids, log_probs, tail = top_k_of(random_logits(n, v, seed), k, temperature)
    exact = TopK(ids, log_probs, tail).buckets()
    stored = TopK(ids, log_probs.half(), tail.half())
    buckets = stored.buckets()
    assert buckets.dtype == torch.float32
    total = buckets.double().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)
    # An entry's own rounding, and what normalising moves all of them by: a mean of the roundings.
    own = exact.abs() / 2048
    shared = (exact.exp() * own).sum(-1, keepdim=True)
    assert ((buckets - exact).abs() <= 1.01 * (own + shared) + 1e-6).all()


@pytest.mark.parametrize("tail", [FLOOR, -200.0, -6e4, float("-inf")])
def test_whatever_is_at_or_below_the_floor_stands_for_an_empty_bucket(tail: float) -> None:
    stored = TopK(torch.tensor([[0]]), torch.zeros(1, 1), torch.tensor([tail]))
    assert stored.buckets().tolist() == [[0.0, FLOOR]]
