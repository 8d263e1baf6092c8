"""The fused head against float64 tables written out here: values, gradients, counts and memory."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from formulas import FORMULAS, alpha, dense_terms, logits_of, outcomes, weighted
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import Head
from fastdraft_hf.data.target_logits import top_k_of
from fastdraft_hf.train.distribution import TargetHead, TopK
from fastdraft_hf.train.head import HeadLoss, fused_head_loss
from fastdraft_hf.train.objectives import _TERMS, PRESETS, Objective

Tensors = dict[str, torch.Tensor]

# float32 against float64: errors over the greatest number of the reference.
CLOSE = 1e-5
# Where the parts of a gradient cancel, it is held against the size of the parts instead: some half
# units in their last place, and as many of the logits, which are exponents. Of 1,500 random cases
# 2 in 100 need it, and no case in 10,000 needs an eighth of it.
OF_THE_PARTS = 6e-8
# Absolute floor of a value, in nats a token and unit of weight.
NATS = 2e-6
# A gradient jumps where p = q; nearer than this, float32 need not see which is greater.
NEAR = 1e-4
KINKED = {"tvd", "nla", "lk_hybrid"}
NAMES = sorted(_TERMS)


@dataclass
class Case:
    """Arguments of the head, in float32."""

    tensors: Tensors
    labels: torch.Tensor
    weights: dict[str, float]
    target: TopK | TargetHead | None = None
    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    chunk: int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def run(self, tensors: Tensors) -> HeadLoss:
        return fused_head_loss(
            **tensors,
            labels=self.labels,
            objective=Objective(self.weights),
            target=self.target,
            temperature=self.temperature,
            scale=self.scale,
            softcap=self.softcap,
            chunk=self.chunk,
            **self.more,
        )


@dataclass
class Exact:
    """What the reference finds; ``parts`` is what a gradient is the difference of, at most."""

    loss: float
    terms: dict[str, float]
    acceptance: float | None
    grads: Tensors
    parts: dict[str, float]
    nearest: float


def exactly(case: Case) -> Exact:
    doubles = {name: t.detach().double().requires_grad_() for name, t in case.tensors.items()}
    logits = logits_of(**doubles, scale=case.scale, softcap=case.softcap)
    values = dense_terms(logits, case.labels, case.weights, case.target, case.temperature)
    # Each logit's gradient is a slope minus q times the sum of slopes: here their absolute sum.
    parts = torch.zeros_like(logits)
    if "ce" in case.weights:
        certain = torch.nn.functional.one_hot(case.labels, logits.shape[1])
        parts += case.weights["ce"] * (torch.softmax(logits.detach(), -1) + certain)
    acceptance, nearest = None, math.inf
    divergences = {name: weight for name, weight in case.weights.items() if name != "ce"}
    if case.target is not None:
        log_p, log_q = (t.detach() for t in outcomes(logits, case.target, case.temperature))
        acceptance = float(alpha(log_p, log_q).sum())
        apart = (log_p - log_q).abs()[torch.maximum(log_p, log_q) > -60]
        if logits.shape[1] > 1 and apart.numel():  # of one token p and q are 1
            nearest = float(apart.min())
        if divergences:
            free = log_q.requires_grad_()
            weighted(
                {n: FORMULAS[n](log_p, free).sum() for n in divergences}, divergences
            ).backward()
            assert free.grad is not None
            # Even a slope of 0 comes from logarithms that are known to a unit in the last place.
            slope = free.grad.abs() + sum(divergences.values()) * free.detach().exp()
            q = torch.softmax(logits.detach() / case.temperature, -1)
            of_token = slope
            if isinstance(case.target, TopK):
                of_token = (slope / free.detach().exp())[:, -1:] * q
                of_token = of_token.scatter(1, case.target.ids, slope[:, :-1])
            parts += (of_token + q * slope.sum(-1, keepdim=True)) / case.temperature
    total = weighted(values, case.weights)
    total.backward()
    parts *= abs(case.scale) * (8 + greatest(logits) / case.temperature)
    sizes = {
        "hidden": parts @ doubles["weight"].detach().abs(),
        "weight": parts.T @ doubles["hidden"].detach().abs(),
        "bias": parts.sum(0),
    }
    return Exact(
        float(total.detach()),
        {name: float(value.detach()) for name, value in values.items()},
        acceptance,
        {name: t.grad for name, t in doubles.items() if t.grad is not None},
        {name: greatest(sizes[name]) for name in doubles},
        nearest,
    )


def greatest(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def compare(case: Case, upstream: float = 1.0, parts: float = OF_THE_PARTS) -> HeadLoss:
    """Run the case, compare its result with the reference and return it."""
    exact = exactly(case)
    assume(exact.nearest > NEAR or not KINKED & set(case.weights))
    ours = {name: t.detach().clone().requires_grad_() for name, t in case.tensors.items()}
    result = case.run(ours)
    (result.loss * upstream).backward()
    n = max(len(case.labels), 1)
    floor = NATS * n * sum(case.weights.values())
    assert float(result.loss.detach()) == pytest.approx(exact.loss, rel=CLOSE, abs=floor)
    assert list(result.terms) == list(case.weights)
    for name, value in exact.terms.items():
        assert float(result.terms[name]) == pytest.approx(value, rel=CLOSE, abs=NATS * n), name
    if exact.acceptance is None:
        assert result.acceptance is None
    else:
        assert result.acceptance is not None
        assert float(result.acceptance) == pytest.approx(exact.acceptance, rel=CLOSE)
    for name, reference in exact.grads.items():
        found = ours[name].grad
        assert found is not None
        error = greatest(found.double() - upstream * reference)
        allowed = max(CLOSE * greatest(reference), parts * exact.parts[name], 1e-30)
        assert error <= abs(upstream) * allowed, (name, error, greatest(reference))
    return result


def draw_tensors(n: int, v: int, h: int, seed: int, spread: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(n, h, generator=generator) * spread / h**0.5,
        "weight": torch.randn(v, h, generator=generator),
        "bias": torch.randn(v, generator=generator) * spread / 2,
    }


def draw_labels(n: int, v: int, seed: int) -> torch.Tensor:
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(seed))


def make(
    n: int = 9,
    v: int = 50,
    h: int = 6,
    *,
    weights: dict[str, float] | str = "ce",
    k: int | str | None = None,
    seed: int = 0,
    spread: float = 1.5,
    **options: Any,
) -> Case:
    """A well-behaved case: ``k`` is how many are stored, "full" for a target's head."""
    tensors = draw_tensors(n, v, h, seed, spread)
    temperature = options.get("temperature", 1.0)
    wanted = draw_tensors(n, v, h + 1, seed + 1, spread)
    head = TargetHead(wanted["hidden"], Head(wanted["weight"], None))
    target: TopK | TargetHead | None = None if k is None else head
    if isinstance(k, int):
        target = TopK(*top_k_of(head.logits(), k, temperature))
    return Case(tensors, draw_labels(n, v, seed), Objective(weights).weights, target, **options)


def copies(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {k: t.detach().to(dtype).requires_grad_() for k, t in tensors.items()}


def grads(tensors: Tensors) -> Tensors:
    return {name: t.grad for name, t in tensors.items() if t.grad is not None}


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return greatest(ours.double() - exact.double()) / max(greatest(exact), 1e-30)


# Every objective, in value and gradient


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 50, "full"])
@pytest.mark.parametrize("name", sorted({*NAMES, *PRESETS}))
def test_every_objective(name: str, k: int | str, temperature: float) -> None:
    """Under 1e-5 with no allowance for what cancels."""
    compare(make(weights=name, k=k, temperature=temperature, chunk=4, spread=1.0), parts=0.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, float]:
    n = draw(st.integers(0, 12))
    v = draw(st.sampled_from([1, 2, 3, 5, 17, 64, 300, 2500]))
    h = draw(st.integers(1, 16))
    seed = draw(st.integers(0, 10**6))
    spread = draw(st.sampled_from([0.3, 1.0, 2.0]))
    temperature = draw(st.sampled_from([0.3, 0.6, 1.0, 1.4, 2.0]))
    weights: dict[str, float] = draw(
        st.one_of(
            st.sampled_from([{name: 1.0} for name in NAMES]),
            st.sampled_from(list(PRESETS.values())),
            st.dictionaries(
                st.sampled_from(NAMES), st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=1
            ),
        )
    )
    tensors, wanted = draw_tensors(n, v, h, seed, spread), draw_tensors(n, v, h + 1, -seed, spread)
    if draw(st.booleans()):  # equal logits of several tokens, also at the k-th position
        for made in (tensors, wanted):
            twins = torch.arange(v) // draw(st.integers(2, 4))
            made["weight"], made["bias"] = made["weight"][twins], made["bias"][twins]
    target = TargetHead(
        wanted["hidden"],
        Head(
            wanted["weight"],
            wanted["bias"] if draw(st.booleans()) else None,
            draw(st.sampled_from([1.0, 0.5])),
            draw(st.sampled_from([None, 5.0])),
        ),
    )
    log_probs = torch.log_softmax(target.logits(), -1)
    labels = {
        "any": draw_labels(n, v, seed),
        "one": torch.full((n,), seed % v),
        "first": log_probs.argmax(-1),
        "last": log_probs.argmin(-1),
    }[draw(st.sampled_from(["any", "one", "first", "last"]))]
    kinds = ["top k", "float16 top k", "shuffled top k", "full"]
    kind = draw(st.sampled_from(kinds if set(weights) != {"ce"} else [*kinds, "none"]))
    chosen: TopK | TargetHead | None = target
    if kind == "none":
        chosen = None
    elif kind != "full":
        k = draw(st.sampled_from(sorted({1, min(2, v), max(1, v // 3), max(1, v - 1), v})))
        ids, kept, tail = top_k_of(target.logits(), k, temperature)
        if kind == "float16 top k":
            kept, tail = kept.half(), tail.half()
        if kind == "shuffled top k":
            order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
            ids, kept = ids[:, order], kept[:, order]
        chosen = TopK(ids, kept, tail)
    if not draw(st.booleans()):
        del tensors["bias"]
    case = Case(
        tensors,
        labels,
        weights,
        chosen,
        temperature,
        draw(st.sampled_from([1.0, 0.125, 2.0, -0.5])),
        draw(st.sampled_from([None, 30.0, 4.0])),
        draw(st.one_of(st.none(), st.integers(1, 14))),
    )
    return case, draw(st.sampled_from([1.0, 0.25, -3.0]))


@settings(max_examples=500)
@given(cases())
def test_values_and_gradients(drawn: tuple[Case, float]) -> None:
    case, upstream = drawn
    result = compare(case, upstream)
    tensors = case.tensors
    logits = logits_of(**tensors, scale=case.scale, softcap=case.softcap)
    near = logits >= logits.amax(-1, keepdim=True) - 1e-5 * (1 + greatest(logits))
    chosen = near.gather(1, case.labels[:, None])
    # Products over one row and over several round differently, so what is near may be a tie.
    alone = chosen & (near.sum(-1, keepdim=True) == 1)
    assert int(alone.sum()) <= int(result.correct) <= int(chosen.sum())


# Numerical limits


def certain(margin: float, k: int | str, name: str) -> Case:
    """A draft sure of a token that the target takes for unlikely."""
    logits = torch.tensor([[margin, 0.5, -0.25, -1.0, 0.0, 1.0]])
    wanted = torch.tensor([[-margin, 1.5, 1.0, -2.0, 0.75, margin]])
    head = TargetHead(wanted, Head(torch.eye(6), None))
    target = head if isinstance(k, str) else TopK(*top_k_of(wanted, k))
    return Case({"hidden": logits, "weight": torch.eye(6)}, torch.tensor([0]), {name: 1.0}, target)


@pytest.mark.parametrize("k", [3, "full"])
@pytest.mark.parametrize("name", ["kl", "rkl", "jsd", "nla", "tvd", "lk_hybrid"])
def test_a_draft_that_is_surely_wrong(name: str, k: int | str) -> None:
    compare(certain(12.0, k, name), parts=0.0)


@pytest.mark.parametrize("name", ["ce", "kl"])
def test_logits_far_from_zero_keep_their_differences(name: str) -> None:
    logits = torch.tensor([[1.0, 0.5, -0.25, -1.0, 0.0, 2.0]]) + 1e4
    target = TopK(*top_k_of(torch.tensor([[0.0, 1.5, 2.0, -1.0, 0.25, 0.5]]), 3))
    tensors = {"hidden": logits, "weight": torch.eye(6)}
    compare(Case(tensors, torch.tensor([0]), {name: 1.0}, target), parts=0.0)


@pytest.mark.parametrize(
    ("dtype", "margin", "weight"), [(torch.float32, 100.0, 10.0), (torch.float16, 14.0, 1.0)]
)
def test_a_tail_that_the_draft_rules_out(dtype: torch.dtype, margin: float, weight: float) -> None:
    target = TopK(torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log())
    tensors = copies({"hidden": torch.tensor([[margin, 0.0, 0.0]]), "weight": torch.eye(3)}, dtype)
    Case(tensors, torch.tensor([0]), {"kl": weight}, target).run(tensors).loss.backward()
    assert torch.isfinite(grads(tensors)["hidden"]).all()


# Types, large numbers, who gets a gradient


@settings(max_examples=60)
@given(
    n=st.integers(1, 50),
    v=st.integers(2, 70),
    h=st.integers(2, 32),
    k=st.sampled_from([None, 2, "full"]),
    temperature=st.sampled_from([0.6, 1.0]),
    seed=st.integers(0, 999),
)
def test_bfloat16_products_are_close(
    n: int, v: int, h: int, k: int | str | None, temperature: float, seed: int
) -> None:
    weights = {"ce": 0.5} if k is None else {"ce": 0.5, "kl": 0.5, "jsd": 1.0}
    case = make(n, v, h, weights=weights, k=k, seed=seed, temperature=temperature, chunk=16)
    exact = exactly(case)
    case.more = {"dtype": torch.bfloat16}
    ours = copies(case.tensors, torch.float32)
    result = case.run(ours)
    result.loss.backward()
    assert abs(float(result.loss.detach()) - exact.loss) < 0.05 * n
    for name, found in grads(ours).items():
        assert found.dtype == torch.float32
        error = float((found.double() - exact.grads[name]).norm())
        assert error < 0.03 * float(exact.grads[name].norm()) + 0.03 * n**0.5


def test_types_may_differ() -> None:
    """Autocast's hidden states with a float32 head; every gradient in its own type."""
    case = make(20, 30, 8, weights={"ce": 0.5, "tvd": 0.5}, k=6, more={"dtype": torch.float32})
    types = {"hidden": torch.bfloat16, "weight": torch.float32, "bias": torch.float16}
    ours = {n: t.to(types[n]).requires_grad_() for n, t in case.tensors.items()}
    exact = exactly(replace(case, tensors=ours))
    with torch.autocast("cpu", torch.bfloat16):
        result = case.run(ours)
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(exact.loss, rel=CLOSE)
    for name, tensor in ours.items():
        assert tensor.grad is not None
        assert tensor.grad.dtype == types[name]
    assert relative(grads(ours)["weight"], exact.grads["weight"]) < CLOSE


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("k", [1, 4, 6, "full"])
@pytest.mark.parametrize("name", NAMES)
def test_large_logits_do_not_overflow(name: str, k: int | str, temperature: float) -> None:
    """±1e4 in the draft or the target, agreeing or not: nothing is nan or infinite."""
    large = torch.tensor([1e4, -1e4, 0.0, 0.0, 3.0, 1.0])
    small = torch.tensor([0.5, 1.0, -1.0, 0.0, 0.25, 2.0])
    logits = torch.stack([large, large, -large, large, small])
    wanted = torch.stack([large, -large, large, small, large])
    head = TargetHead(wanted, Head(torch.eye(6), None))
    target = head if isinstance(k, str) else TopK(*top_k_of(wanted, k, temperature))
    tensors = copies({"hidden": logits, "weight": torch.eye(6)}, torch.float32)
    case = Case(tensors, torch.tensor([0, 1, 2, 3, 4]), {name: 1.0}, target, temperature)
    result = case.run(tensors)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert float(result.loss.detach()) >= -1e-4
    for found in grads(tensors).values():
        assert torch.isfinite(found).all()
    if name == "jsd":
        assert float(result.loss.detach()) <= 5 * math.log(2) + 1e-4


# What is reported beside the loss


@given(
    n=st.integers(1, 20),
    v=st.integers(1, 6),
    chunk=st.integers(1, 21),
    stored=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_counts_take_ties_as_chosen(
    n: int, v: int, chunk: int, stored: bool, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-1, 2, (n, 2), generator=generator).float()
    weight = torch.randint(-1, 2, (v, 2), generator=generator).float()  # small integers: many ties
    wanted = torch.randn(n, v, generator=generator)
    labels = torch.randint(0, v, (n,), generator=generator)
    full = TargetHead(wanted, Head(torch.eye(v), None))
    target = TopK(*top_k_of(wanted, 1, temperature)) if stored else full
    result = fused_head_loss(
        hidden, weight, labels, target=target, temperature=temperature, chunk=chunk
    )
    logits = hidden @ weight.T
    highest = logits.amax(-1)
    for found, ids in ((result.correct, labels), (result.agreement, wanted.argmax(-1))):
        assert found is not None
        assert int(found) == int((logits[torch.arange(n), ids] == highest).sum())


# Memory


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had which any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor):
                self.numel = max(self.numel, made.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("k", [None, 6, "full"])
@pytest.mark.parametrize(("n", "chunk"), [(40, 8), (300, 8), (300, 1), (1000, 8)])
def test_no_table_of_tokens_by_vocabulary(
    n: int, chunk: int, k: int | str | None, temperature: float, dtype: torch.dtype
) -> None:
    v, h = 700, 4
    weights = {"ce": 0.5} if k is None else {"ce": 0.5, "kl": 1.0, "lk_hybrid": 1.0, "jsd": 1.0}
    options: dict[str, Any] = {"temperature": temperature, "chunk": chunk}
    case = make(n, v, h, weights=weights, k=k, softcap=30.0, scale=0.5, **options)
    case.more = {"dtype": dtype}
    ours = copies(case.tensors, torch.float32)
    with Largest() as largest:
        case.run(ours).loss.backward()
    assert set(grads(ours)) == {"hidden", "weight", "bias"}
    assert max(chunk * v, v * (h + 1), n * h) < n * v
    # [N, H] is the gradient asked for; a row of the target's head has one number more.
    assert largest.numel <= max(chunk * v, v * (h + (k == "full")), n * h)


# Wrong input


@pytest.mark.parametrize("shape", [(3,), (4, 1)])
@pytest.mark.parametrize("what", ["labels", "distribution"])
def test_other_tokens_are_refused(shape: tuple[int, ...], what: str) -> None:
    target = TargetHead(torch.zeros(*shape, 7), Head(torch.zeros(5, 7), None))
    labels = torch.zeros(shape if what == "labels" else 4, dtype=torch.long)
    given_target = None if what == "labels" else target
    with pytest.raises(FastDraftError, match="hidden states, labels and distribution are of"):
        fused_head_loss(torch.zeros(4, 3), torch.zeros(5, 3), labels, target=given_target)


def test_a_divergence_needs_a_distribution() -> None:
    with pytest.raises(FastDraftError, match=r"objective .* needs the target's distribution"):
        make(weights="ce_kl").run(make().tensors)
