"""The terms against their formulas, what holds over buckets, and the registry."""

import math

import pytest
import torch
from formulas import FORMULAS
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft_hf._head import Head
from fastdraft_hf.data.target_logits import top_k_of
from fastdraft_hf.train import objectives
from fastdraft_hf.train.distribution import TargetHead, TopK
from fastdraft_hf.train.head import fused_head_loss
from fastdraft_hf.train.objectives import Objective, Pair, Term, register_term

NAMES = sorted(objectives._TERMS)
LOWER = ["kl", "rkl", "jsd", "tvd", "nla"]
KINKED = {"tvd", "nla", "lk_hybrid"}


def log_rows(n: int, b: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, b, generator=generator, dtype=torch.float64) * spread
    return torch.log_softmax(logits, -1)


def log_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def value(name: str, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return objectives._TERMS[name].value_and_slope(Pair(log_p, log_q))[0]


def through_softmax(slope: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What a slope by ``log q`` is by the logits; a multiple of q does not show."""
    return slope - q * slope.sum(-1, keepdim=True)


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "_TERMS", {**objectives._TERMS})


# Terms


@pytest.mark.parametrize("name", NAMES)
@given(n=st.integers(1, 6), b=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_value_and_slope(name: str, n: int, b: int, seed: int) -> None:
    term = objectives._TERMS[name]
    log_p, log_q = log_rows(n, b, seed), log_rows(n, b, seed + 1)
    logits = log_q.clone().requires_grad_()
    values, slope = term.value_and_slope(Pair(log_p, log_q))
    free = torch.log_softmax(logits, -1)
    expected = -(log_p.exp() * free).sum(-1) if name == "ce" else FORMULAS[name](log_p, free)
    expected.sum().backward()
    torch.testing.assert_close(values, expected.detach(), rtol=1e-9, atol=1e-12)
    assert logits.grad is not None
    ours = through_softmax(slope, log_q.exp())
    torch.testing.assert_close(ours, logits.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ce"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_distribution_has_value_and_gradient_zero(name: str, dtype: torch.dtype) -> None:
    log_p = log_rows(5, 30, 3).to(dtype)
    values, slope = objectives._TERMS[name].value_and_slope(Pair(log_p, log_p.clone()))
    size = 1e-6 if dtype == torch.float32 else 1e-14
    assert values.abs().max() <= size
    # At the kink half of q is taken for every token, which is a multiple of q as well.
    assert through_softmax(slope, log_p.exp()).abs().max() <= size


@given(n=st.integers(1, 5), b=st.integers(2, 30), seed=st.integers(0, 10**6))
def test_at_a_kink_the_slope_is_a_subgradient(n: int, b: int, seed: int) -> None:
    """Some tokens have p = q exactly: there the slope is the middle of both one-sided ones."""
    log_p, log_q = log_rows(n, b, seed), log_rows(n, b, seed + 1)
    same = torch.rand(n, b, generator=torch.Generator().manual_seed(seed)) < 0.4
    log_q = torch.where(same, log_p, log_q)
    pair = Pair(log_p, log_q)
    slope = objectives._TERMS["tvd"].value_and_slope(pair)[1]
    p, q = pair.p, pair.q
    # A multiple of q is free; with this one the slope of 1 − Σ min(p, q) is -q or 0.
    likeliest = q.argmax(-1, keepdim=True)
    plain = slope + q * ((q - p).gather(1, likeliest).sign() - 1) / 2
    torch.testing.assert_close(plain[q > p], torch.zeros_like(q[q > p]))
    torch.testing.assert_close(plain[q < p], -q[q < p])
    torch.testing.assert_close(plain[same], -q[same] / 2)  # of the interval from −q to 0
    alphas = torch.minimum(p, q).sum(-1, keepdim=True)
    torch.testing.assert_close(objectives._TERMS["nla"].value_and_slope(pair)[1], slope / alphas)


# Buckets


def merged(log_p: torch.Tensor, log_q: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the k most probable of p; the tail is one outcome."""
    ids = log_p.topk(k, -1).indices

    def buckets(rows: torch.Tensor) -> torch.Tensor:
        tail = rows.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([rows.gather(1, ids), tail], 1)

    return buckets(log_p), buckets(log_q)


@settings(max_examples=100)
@given(
    n=st.integers(1, 6), b=st.integers(2, 60), share=st.floats(0, 0.999), seed=st.integers(0, 10**6)
)
def test_over_buckets_divergences_are_lower_bounds(n: int, b: int, share: float, seed: int) -> None:
    k = max(1, int(share * b))
    log_p, log_q = log_rows(n, b, seed), log_rows(n, b, seed + 1)
    pair = merged(log_p, log_q, k)
    for name in LOWER:
        assert (value(name, *pair) <= value(name, log_p, log_q) + 1e-12).all(), name
    assert (Pair(*pair).acceptance >= Pair(log_p, log_q).acceptance - 1e-12).all()
    share_b = torch.exp(-3 * Pair(*pair).acceptance)
    mix = share_b * value("kl", *pair) + (1 - share_b) * value("tvd", *pair)
    torch.testing.assert_close(value("lk_hybrid", *pair), mix)


# The first two tokens are kept; p of the other three is 0.1, 0.06 and 0.04.
TARGET = log_of([0.5, 0.3, 0.1, 0.06, 0.04])
CASES = {
    # p/q the same for all merged tokens: nothing is lost.
    "same ratio": (log_of([0.3, 0.3, 0.2, 0.12, 0.08]), set(LOWER)),
    # p ≤ q (or p ≥ q) for all of them, with other ratios: only what counts min(p, q) is exact.
    "p below q": (log_of([0.3, 0.3, 0.11, 0.08, 0.21]), {"tvd", "nla"}),
    "p above q": (log_of([0.4, 0.45, 0.08, 0.04, 0.03]), {"tvd", "nla"}),
    # p above q for one and below for another: everything is a strict bound.
    "crossed": (log_of([0.4, 0.3, 0.05, 0.05, 0.2]), set()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOWER)
def test_when_a_bound_is_exact_and_when_strict(name: str, case: str) -> None:
    log_q, exact = CASES[case]
    full = float(value(name, TARGET, log_q))
    bound = float(value(name, *merged(TARGET, log_q, 2)))
    if name in exact:
        assert bound == pytest.approx(full, rel=1e-9)
    else:
        assert bound < full - 1e-4


# Objectives


def test_presets_are_the_papers() -> None:
    assert Objective("ce_kl").weights == {"ce": 0.5, "kl": 0.5}
    assert Objective("ce_tvd").weights == {"ce": 0.5, "tvd": 0.5}
    assert Objective("tvd").weights == {"tvd": 1.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("tdv", r"there is no 'tdv' \(did you mean 'tvd'\?\); terms: .*; presets: .*ce_kl"),
        ("ce_lk", r"did you mean 'ce_kl'\?"),
        ("zzzzzz", r"there is no 'zzzzzz'; terms: "),
        ({"klx": 1.0}, r"objective\.klx: there is no such term \(did you mean 'kl'\?\)"),
        ({"ce": 1.0, "ce_kl": 1.0}, r"objective\.ce_kl: there is no such term"),
        ({}, "at least one term is needed"),
    ],
)
def test_unknown_names(weights: dict[str, float] | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(weights)


@pytest.mark.parametrize(
    "weight", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, True, False, "1", None, [1.0]]
)
def test_a_weight_is_a_number_above_zero(weight: object) -> None:
    with pytest.raises(ValueError, match=r"objective\.kl: a weight above 0 is needed, got"):
        Objective({"ce": 1.0, "kl": weight})  # type: ignore[dict-item]


# The registry


class SquaredDistance(Term):
    """``Σ (p − q)²``, which is nowhere in the package."""

    name = "squared_distance"

    def value_and_slope(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        apart = pair.q - pair.p
        return apart.square().sum(-1), 2 * apart * pair.q


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize("k", [3, None])
def test_a_term_from_outside_trains(k: int | None) -> None:
    assert register_term(SquaredDistance) is SquaredDistance
    objective = Objective({"squared_distance": 2.0, "ce": 0.1})
    assert "squared_distance" in objectives._TERMS
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 5, generator=generator)
    weight = torch.randn(9, 5, generator=generator).requires_grad_()
    wanted, rows = (torch.randn(s, 5, generator=generator) for s in (12, 9))
    head = TargetHead(wanted, Head(rows, None))
    target = head if k is None else TopK(*top_k_of(head.logits(), k))
    labels = head.logits().argmax(-1)
    optimizer, values = torch.optim.SGD([weight], lr=0.05), []
    for _ in range(60):
        optimizer.zero_grad()
        result = fused_head_loss(hidden, weight, labels, objective=objective, target=target)
        result.loss.backward()
        optimizer.step()
        values.append(float(result.terms["squared_distance"]))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.usefixtures("_own_registry")
def test_a_name_that_is_taken_is_refused() -> None:
    before = objectives._TERMS["kl"]

    class Mine(SquaredDistance):
        name = "kl"

    with pytest.raises(ValueError, match="a term named 'kl' is already registered"):
        register_term(Mine)
    assert objectives._TERMS["kl"] is before
