"""The fused head against the plain formula: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft_hf.training.head import dense_cross_entropy, fused_cross_entropy

Tensors = dict[str, torch.Tensor]


def make(n: int, v: int, h: int, seed: int, spread: float = 1.0) -> tuple[Tensors, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "hidden": torch.randn(n, h, generator=generator) * spread,
        "weight": torch.randn(v, h, generator=generator),
        "bias": torch.randn(v, generator=generator),
    }
    return tensors, torch.randint(0, v, (n,), generator=generator)


def copies(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {k: t.detach().to(dtype).requires_grad_() for k, t in tensors.items()}


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    ours, exact = ours.detach(), exact.detach()
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-3))


options = st.fixed_dictionaries(
    {
        "scale": st.sampled_from([1.0, 0.125, 2.5, -0.5]),
        "softcap": st.sampled_from([None, 30.0, 2.0]),
    }
)


@settings(max_examples=120)
@given(
    n=st.integers(1, 40),
    v=st.integers(1, 60),
    h=st.integers(1, 24),
    chunk=st.integers(1, 50),
    with_bias=st.booleans(),
    option=options,
    upstream=st.sampled_from([1.0, 0.25, -3.0]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients(
    n: int,
    v: int,
    h: int,
    chunk: int,
    with_bias: bool,
    option: dict[str, float | None],
    upstream: float,
    spread: float,
    seed: int,
) -> None:
    tensors, labels = make(n, v, h, seed, spread)
    if not with_bias:
        del tensors["bias"]
    ours, exact = copies(tensors, torch.float32), copies(tensors, torch.float64)
    result = fused_cross_entropy(
        ours["hidden"], ours["weight"], labels, ours.get("bias"), chunk=chunk, **option
    )
    reference = dense_cross_entropy(
        exact["hidden"], exact["weight"], labels, exact.get("bias"), **option
    )
    (result.loss * upstream).backward()
    (reference * upstream).backward()
    assert relative(result.loss, reference) < 1e-5
    for name in tensors:
        # A gradient that cancels to nothing is held against the size of what cancels.
        size = float(exact[name].grad.norm())
        error = float((ours[name].grad.double() - exact[name].grad).norm())
        terms = abs(upstream) * n * (h**0.5) * max(1.0, spread)
        assert error < 1e-5 * size + 2e-7 * terms


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", None])
def test_only_what_is_wanted_gets_a_gradient(wanted: str | None) -> None:
    tensors, labels = make(9, 13, 5, seed=0)
    ours = {k: t.clone().requires_grad_(k == wanted) for k, t in tensors.items()}
    exact = {k: t.double().requires_grad_(k == wanted) for k, t in tensors.items()}
    loss = fused_cross_entropy(ours["hidden"], ours["weight"], labels, ours["bias"], chunk=4).loss
    reference = dense_cross_entropy(exact["hidden"], exact["weight"], labels, exact["bias"])
    assert relative(loss, reference) < 1e-5
    if wanted is None:
        assert not loss.requires_grad
        return
    loss.backward()
    reference.backward()
    assert relative(ours[wanted].grad, exact[wanted].grad) < 1e-5
    assert [k for k, t in ours.items() if t.grad is not None] == [wanted]


@given(n=st.integers(1, 50), v=st.integers(2, 70), h=st.integers(2, 32), seed=st.integers(0, 999))
def test_bfloat16_is_close(n: int, v: int, h: int, seed: int) -> None:
    tensors, labels = make(n, v, h, seed)
    ours, exact = copies(tensors, torch.float32), copies(tensors, torch.float64)
    result = fused_cross_entropy(
        ours["hidden"], ours["weight"], labels, chunk=16, dtype=torch.bfloat16
    )
    reference = dense_cross_entropy(exact["hidden"], exact["weight"], labels)
    result.loss.backward()
    reference.backward()
    assert abs(float(result.loss.detach()) - float(reference.detach())) < 0.05 * n
    for name in ("hidden", "weight"):
        assert ours[name].grad.dtype == torch.float32
        error = (ours[name].grad.double() - exact[name].grad).norm()
        assert float(error) < 0.03 * float(exact[name].grad.norm()) + 0.02 * n**0.5


def test_bfloat16_tensors_get_bfloat16_gradients() -> None:
    tensors, labels = make(20, 30, 8, seed=1)
    ours, exact = copies(tensors, torch.bfloat16), copies(tensors, torch.float64)
    fused_cross_entropy(ours["hidden"], ours["weight"], labels, ours["bias"]).loss.backward()
    dense_cross_entropy(exact["hidden"], exact["weight"], labels, exact["bias"]).backward()
    for name in tensors:
        assert ours[name].grad.dtype == torch.bfloat16
        assert relative(ours[name].grad, exact[name].grad) < 0.05


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_do_not_overflow(size: float) -> None:
    tensors, labels = make(12, 20, 6, seed=2, spread=size)
    ours, exact = copies(tensors, torch.float32), copies(tensors, torch.float64)
    loss = fused_cross_entropy(ours["hidden"], ours["weight"], labels).loss
    reference = dense_cross_entropy(exact["hidden"], exact["weight"], labels)
    loss.backward()
    reference.backward()
    assert relative(loss, reference) < 1e-5
    assert relative(ours["weight"].grad, exact["weight"].grad) < 1e-2
    assert torch.isfinite(ours["hidden"].grad).all()


@given(n=st.integers(1, 20), v=st.integers(1, 6), chunk=st.integers(1, 21), seed=st.integers(0, 99))
def test_correct_counts_ties_as_chosen(n: int, v: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-1, 2, (n, 2), generator=generator).float()
    weight = torch.randint(-1, 2, (v, 2), generator=generator).float()  # small integers: many ties
    labels = torch.randint(0, v, (n,), generator=generator)
    logits = hidden @ weight.T
    expected = sum(logits[i, labels[i]] == logits[i].max() for i in range(n))
    result = fused_cross_entropy(hidden, weight, labels, chunk=chunk)
    assert int(result.correct) == int(expected)
    assert not result.correct.requires_grad


def test_one_weight_for_two_uses() -> None:
    """Tied embeddings: the head's gradient adds to the input's, whatever order they come in."""
    tensors, labels = make(7, 11, 4, seed=3)
    gradients = []
    for head in (
        lambda h, w: fused_cross_entropy(h, w, labels, chunk=3).loss,
        lambda h, w: dense_cross_entropy(h, w, labels),
    ):
        weight = tensors["weight"].double().float().requires_grad_()
        hidden = torch.tanh(weight[labels.flip(0)])
        head(hidden, weight).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_no_tokens() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    hidden = torch.empty(0, 3, requires_grad=True)
    result = fused_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long))
    result.loss.backward()
    assert (result.loss.item(), int(result.correct)) == (0.0, 0)
    assert torch.equal(weight.grad, torch.zeros(5, 3))


@pytest.mark.parametrize(
    ("hidden", "weight", "labels"),
    [
        ((4, 3), (5, 2), (4,)),
        ((2, 4, 3), (5, 3), (2, 4)),
        ((4, 3), (5, 3), (3,)),
        ((4, 3), (5,), (4,)),
    ],
)
def test_bad_shapes(
    hidden: tuple[int, ...], weight: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"(mismatch|do not match)"):
        fused_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.long)
        )
