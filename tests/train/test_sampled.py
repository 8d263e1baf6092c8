"""Sampled softmax: what is scored, that all drawn is the whole, and right on average."""

from typing import Any

import pytest
import torch
from formulas import dense_terms, logits_of, weighted
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft_hf.train.distribution import TopK
from fastdraft_hf.train.head import fused_head_loss
from fastdraft_hf.train.objectives import Objective
from fastdraft_hf.train.sampled import SampledHead, sample_head


def case(seed: int, tokens: int, vocabulary: int, k: int = 0, bias: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    target = None
    if k:
        logits = torch.randn(tokens, vocabulary, generator=generator)
        log_probs, ids = torch.log_softmax(logits, -1).topk(k)
        tail = torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - 1e-6))
        target = TopK(ids, log_probs, tail)
    return {
        "hidden": torch.randn(tokens, 8, generator=generator),
        "weight": torch.randn(vocabulary, 8, generator=generator) / 2,
        "labels": torch.randint(vocabulary, (tokens,), generator=generator),
        "bias": torch.randn(vocabulary, generator=generator) if bias else None,
        "target": target,
    }


def sampled(parts: dict[str, Any], negatives: int, seed: int = 0, **more: Any) -> SampledHead:
    return sample_head(
        parts["weight"],
        parts["labels"],
        negatives,
        parts["bias"],
        target=parts["target"],
        generator=torch.Generator().manual_seed(seed),
        **more,
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 12),
    vocabulary=st.integers(5, 60),
    negatives=st.integers(1, 70),
    k=st.sampled_from([0, 1, 5]),
    bias=st.booleans(),
)
def test_what_is_scored(
    seed: int, tokens: int, vocabulary: int, negatives: int, k: int, bias: bool
) -> None:
    parts = case(seed, tokens, vocabulary, k, bias)
    found = sampled(parts, negatives, seed)
    occurs = set(parts["labels"].tolist())
    if k:
        occurs |= set(parts["target"].ids.flatten().tolist())
    ids = found.ids.tolist()
    assert ids == sorted(set(ids))
    assert occurs <= set(ids)
    assert len(ids) == min(vocabulary, len(occurs) + negatives)
    assert torch.equal(found.weight, parts["weight"][found.ids])
    assert torch.equal(found.ids[found.labels], parts["labels"])
    if k:
        assert found.target is not None
        assert torch.equal(found.ids[found.target.ids], parts["target"].ids)
        assert found.target.log_probs is parts["target"].log_probs
    added = found.bias if parts["bias"] is None else found.bias - parts["bias"][found.ids]
    left = vocabulary - len(occurs)
    for token, value in zip(ids, added.tolist(), strict=True):
        stands_for = 1.0 if token in occurs else left / min(negatives, left)
        assert torch.tensor(value).exp().item() == pytest.approx(stands_for, rel=1e-5)


@pytest.mark.parametrize("objective", ["ce", "nla", {"ce": 0.5, "kl": 0.5}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_all_drawn_is_the_dense_loss(objective: Any, bias: bool, scale: float) -> None:
    """Values and gradients, by everything."""
    parts = case(3, 9, 40, k=4, bias=bias)
    leaves = [parts[name].requires_grad_() for name in ("hidden", "weight", "bias") if
              parts[name] is not None]  # fmt: skip
    goal = Objective(objective)
    logits = logits_of(parts["hidden"], parts["weight"], parts["bias"], scale)
    terms = dense_terms(logits, parts["labels"], goal.weights, parts["target"])
    dense = weighted(terms, goal.weights)
    wanted = torch.autograd.grad(dense, leaves)
    found = sampled(parts, 40, scale=scale)
    loss = fused_head_loss(
        parts["hidden"],
        found.weight,
        found.labels,
        found.bias,
        objective=goal,
        target=found.target,
        scale=scale,
    ).loss
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_denominator_is_right_on_average(scale: float) -> None:
    """The estimate of Σ exp(logit) is unbiased; without what a drawn id stands for it is not."""
    parts = case(5, 6, 200, bias=True)
    weight, hidden, bias = parts["weight"].double(), parts["hidden"].double(), parts["bias"]
    exact = (scale * (hidden @ weight.T + bias)).exp().sum(-1)
    with_correction, without = [], []
    for seed in range(2000):
        found = sampled(parts, 20, seed, scale=scale)
        logits = scale * (hidden @ weight[found.ids].T + found.bias)
        with_correction.append(logits.exp().sum(-1))
        without.append((scale * (hidden @ weight[found.ids].T + bias[found.ids])).exp().sum(-1))
    estimates = torch.stack(with_correction)
    error = (estimates.mean(0) - exact) / (estimates.std(0) / len(estimates) ** 0.5)
    assert error.abs().max() < 4
    assert (torch.stack(without).mean(0) < 0.5 * exact).all()


def test_every_id_is_drawn_and_only_rows_that_are_scored_get_a_gradient() -> None:
    parts = case(7, 4, 60)
    weight = parts["weight"].requires_grad_()
    seen: set[int] = set()
    for seed in range(60):
        found = sampled(parts, 6, seed)
        loss = fused_head_loss(parts["hidden"], found.weight, found.labels, found.bias).loss
        (gradient,) = torch.autograd.grad(loss, [weight])
        assert gradient.abs().sum(-1).nonzero()[:, 0].tolist() == found.ids.tolist()
        seen |= set(found.ids.tolist())
    assert seen == set(range(60))
