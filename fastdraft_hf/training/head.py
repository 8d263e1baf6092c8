"""The objective over a language-model head in one pass, never holding [tokens, vocabulary].

For a draft of 10M parameters and a vocabulary of 49k, the head is nine tenths of the work of
training. Chunk by chunk of tokens, the forward pass computes the logits, every term's value and
the gradients, and keeps only the gradients, so the projection is done once and not again in the
backward pass (as a checkpointed head does), and memory does not grow with tokens x vocabulary.

For a term f over B outcomes with s = ∂f/∂(log q), and z the logits, the gradient is

    ∂f/∂z_v = (q_v / q_b) s_b − q_v Σ s,    b the outcome that token v belongs to.

With stored top-k that is one factor for the whole row of the softmax, and k entries written over
it: token-level objectives cost little more than cross-entropy.

Shapes: N tokens that carry loss, H hidden size, V vocabulary, B outcomes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastdraft_hf._head import head_logits
from fastdraft_hf.training.distribution import TargetHead, TopK
from fastdraft_hf.training.objectives import Objective, Pair

# Bytes of a chunk's logits, so that memory is the same for every vocabulary: 256 tokens of 49k in
# float32. With the target's full distribution at hand a chunk has several such tables.
CHUNK_BYTES = 256 * 49_152 * 4
_CHUNK_BYTES_FULL = CHUNK_BYTES // 4
_PRODUCT_ROWS = 16_384


class HeadLoss(NamedTuple):
    """What the head gave, summed over tokens.

    Attributes:
        loss: scalar, the weighted sum of the terms in nats; differentiable.
        terms: every term's own sum, by name, before weighting.
        correct: how many labels were the head's first choice (ties count as chosen).
        acceptance: Σ α, the expected acceptances; None without a distribution.
        agreement: how often the target's first choice was the head's; None without a distribution.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    correct: torch.Tensor
    acceptance: torch.Tensor | None
    agreement: torch.Tensor | None


class _Sums:
    """What is added up over chunks: the weighted loss, each term, the counts."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        # Not every accelerator has float64.
        self.dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32

        def zero() -> torch.Tensor:
            return torch.zeros((), dtype=self.dtype, device=device)

        self.terms = {name: zero() for name in objective.weights}
        self.correct, self.acceptance, self.agreement = zero(), zero(), zero()

    def vector(self) -> torch.Tensor:
        return torch.stack([*self.terms.values(), self.correct, self.acceptance, self.agreement])


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        objective: Objective,
        target: TopK | TargetHead | None,
        temperature: float,
        scale: float,
        softcap: float | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants[2] else None
        )
        projection = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        sums = _Sums(objective, hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].to(dtype)
            logits = head_logits(part, projection, offset, scale, softcap)
            gradient = _logits_gradient(
                logits,
                labels[rows, None],
                objective,
                None if target is None else target[rows],
                temperature,
                sums,
            )
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            # From here on `gradient` becomes that of the loss by the raw projection.
            if softcap is not None:
                gradient *= 1 - (logits / softcap).square()
            if scale != 1.0:
                gradient *= scale
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                grad_hidden[rows] = gradient @ projection
            if grad_weight is not None:
                _add_product(grad_weight, gradient, part)
        # Not saved for backward as such: they are no tensors of the graph, and one that is let go
        # of becomes the parameter's gradient itself instead of being copied.
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        vector = sums.vector()
        ctx.mark_non_differentiable(vector)
        loss = torch.zeros((), dtype=sums.dtype, device=hidden.device)
        for name, value in sums.terms.items():
            loss = loss + objective.weights[name] * value
        return loss.float(), vector

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the head's gradients were used; call the loss again for a second pass"
            )
        grad_hidden, grad_weight, grad_bias = ctx.gradients
        ctx.gradients = None
        weight_dtype, bias_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.mul_(grad_loss).to(bias_dtype)
        return grad_hidden, grad_weight, grad_bias, *([None] * 8)


def _add_product(total: torch.Tensor, gradient: torch.Tensor, part: torch.Tensor) -> None:
    """Add ``gradient.T @ part`` to ``total`` [V, H] in float32."""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.T, part)
        return
    # A product in another type needs a table to stand in; of some rows at a time, for it to be
    # small whatever the vocabulary.
    for start in range(0, total.shape[0], _PRODUCT_ROWS):
        rows = slice(start, start + _PRODUCT_ROWS)
        total[rows] += gradient[:, rows].T @ part


def _logits_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    objective: Objective,
    target: TopK | TargetHead | None,
    temperature: float,
    sums: _Sums,
) -> torch.Tensor:
    """Add a chunk's values to ``sums`` and return the gradient by its logits, [n, V]."""
    highest = logits.amax(-1, keepdim=True)
    sums.correct += (logits.gather(1, labels) >= highest).sum()
    label_weight = objective.label_weight
    if target is None:
        return _label_gradient(logits, highest, labels, label_weight, sums)
    if isinstance(target, TargetHead):
        gradient = _full_gradient(logits, highest, target, objective, temperature, sums)
    elif temperature == 1.0:  # the label's term shares the softmax
        return _top_k_gradient(logits, highest, target, objective, 1.0, label_weight, labels, sums)
    else:
        gradient = _top_k_gradient(
            logits, highest, target, objective, temperature, 0.0, labels, sums
        )
    if label_weight:
        gradient += _label_gradient(logits, highest, labels, label_weight, sums)
    return gradient


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax [n, V] in the logits' type, and log q of the most probable token [n, 1].

    The softmax sums in float32 inside, whatever its type. Any token's log q is its logit minus the
    highest plus this one: differences of logits stay exact where log Σ exp would be rounded to the
    size of the logits.
    """
    probabilities = torch.softmax(logits, -1)
    return probabilities, probabilities.amax(-1, keepdim=True).float().log()


def _log_q(
    logits: torch.Tensor, ids: torch.Tensor, highest: torch.Tensor, log_highest: torch.Tensor
) -> torch.Tensor:
    """Return log q of ``ids`` [n, k] in float32."""
    return logits.gather(1, ids).float() - highest.float() + log_highest


def _label_gradient(
    logits: torch.Tensor,
    highest: torch.Tensor,
    labels: torch.Tensor,
    weight: float,
    sums: _Sums,
) -> torch.Tensor:
    """Cross-entropy: q − 1 at the label."""
    gradient, log_highest = _softmax(logits)
    sums.terms["ce"] -= _log_q(logits, labels, highest, log_highest).sum(dtype=sums.dtype)
    gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -1.0))
    if weight != 1.0:
        gradient *= weight
    return gradient


def _terms_over(pair: Pair, objective: Objective, sums: _Sums) -> torch.Tensor | None:
    """Add every divergence's values to ``sums``; return the weighted slopes [n, B]."""
    slope: torch.Tensor | None = None
    for name, (weight, term) in objective.divergences.items():
        values, by_log_q = term.value_and_slope(pair)
        sums.terms[name] += values.sum(dtype=sums.dtype)
        weighted = weight * by_log_q
        slope = weighted if slope is None else slope + weighted
    sums.acceptance += pair.acceptance.sum(dtype=sums.dtype)
    return slope


def _top_k_gradient(
    logits: torch.Tensor,
    highest: torch.Tensor,
    target: TopK,
    objective: Objective,
    temperature: float,
    label_weight: float,
    labels: torch.Tensor,
    sums: _Sums,
) -> torch.Tensor:
    """The terms over k tokens and the bucket of the rest, and cross-entropy if its weight is given.

    ``label_weight`` is that of a cross-entropy at the same temperature.
    """
    if temperature != 1.0:
        logits, highest = logits / temperature, highest / temperature
    probabilities, log_highest = _softmax(logits)
    sums.agreement += (logits.gather(1, target.first()) >= highest).sum()
    kept = _log_q(logits, target.ids, highest, log_highest)
    # The rest is summed over itself: 1 − Σ of the others would lose a small one to rounding.
    rest = probabilities.scatter_(1, target.ids, 0.0).sum(-1, keepdim=True, dtype=torch.float32)
    rest = rest.clamp(min=torch.finfo(torch.float32).tiny)
    pair = Pair(target.buckets(), torch.cat([kept, rest.log()], 1))
    slope = _terms_over(pair, objective, sums)
    kept_q = kept.exp()
    row = torch.full_like(rest, label_weight)
    at_kept = label_weight * kept_q
    if slope is not None:
        total = slope.sum(-1, keepdim=True)
        row += (slope[:, -1:] / rest - total) / temperature
        # Where the draft rules the rest out, this is a huge number times probabilities of zero.
        most = torch.finfo(probabilities.dtype).max / 2
        row.clamp_(min=-most, max=most)
        at_kept += (slope[:, :-1] - kept_q * total) / temperature
    gradient = probabilities.mul_(row.to(probabilities.dtype))
    gradient.scatter_(1, target.ids, at_kept.to(gradient.dtype))
    if label_weight:
        sums.terms["ce"] -= _log_q(logits, labels, highest, log_highest).sum(dtype=sums.dtype)
        gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -label_weight))
    return gradient


def _full_gradient(
    logits: torch.Tensor,
    highest: torch.Tensor,
    target: TargetHead,
    objective: Objective,
    temperature: float,
    sums: _Sums,
) -> torch.Tensor:
    """The terms over the whole vocabulary."""
    wanted = target.logits()
    sums.agreement += (logits.gather(1, wanted.argmax(-1, keepdim=True)) >= highest).sum()
    pair = Pair(
        torch.log_softmax(wanted / temperature, -1),
        torch.log_softmax(logits.float() / temperature, -1),
    )
    slope = _terms_over(pair, objective, sums)
    if slope is None:  # cross-entropy alone; the target is there for the acceptance in the log
        return torch.zeros_like(logits)
    total = slope.sum(-1, keepdim=True)
    gradient: torch.Tensor = slope.addcmul(pair.q, total, value=-1.0)
    return gradient.div_(temperature).to(logits.dtype)


def fused_head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    objective: Objective | None = None,
    target: TopK | TargetHead | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
) -> HeadLoss:
    """Return the summed objective under a language-model head.

    The logits are ``scale * (hidden @ weight.T + bias)``, soft-capped to
    ``softcap * tanh(logits / softcap)`` when a cap is given (Gemma 2).

    Args:
        hidden: [N, H], the last hidden states of the tokens that carry loss.
        weight: [V, H], the head's weights, tied or not.
        labels: [N], the ids to predict (already shifted), none of them ignored.
        bias: [V].
        objective: the weighted terms; cross-entropy by default.
        target: the target's distribution for every one of the N tokens.
        temperature: of both distributions in the divergences (stored ones were made at it);
            cross-entropy is taken at 1. Values and gradients are not rescaled by it.
        scale: factor of the logits (Granite divides by ``logits_scaling``, Cohere multiplies).
        softcap: cap of the logits.
        chunk: tokens at a time; by default as many as keep the memory the same for any vocabulary.
        dtype: of the matrix products; ``hidden``'s by default. Sums stay in float32. For float16
            it is float32: half of a softmax over a vocabulary lies below what float16 can hold.

    Raises:
        ValueError: the shapes do not belong together, a number is out of its range, or a term
            needs a distribution and there is none.
    """
    objective = objective or Objective("ce")
    _check(hidden, weight, labels, target)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not match {weight.shape[0]} ids")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    dtype = dtype or hidden.dtype
    if dtype == torch.float16:
        dtype = torch.float32
    if objective.needs_distribution and target is None:
        raise ValueError(f"objective {objective} needs the target's distribution")
    if chunk is None:
        size = dtype.itemsize
        if isinstance(target, TargetHead):
            chunk = _CHUNK_BYTES_FULL // (4 * weight.shape[0])
        else:
            chunk = CHUNK_BYTES // (size * weight.shape[0])
        chunk = max(16, chunk)
    # Under autocast the products would be in its type, whatever `dtype` says.
    with torch.autocast(hidden.device.type, enabled=False):
        loss, vector = _FusedHead.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            bias,
            labels,
            objective,
            target,
            temperature,
            scale,
            softcap,
            chunk,
            dtype,
        )
    *values, correct, acceptance, agreement = vector
    known = target is not None
    return HeadLoss(
        loss,
        dict(zip(objective.weights, values, strict=True)),
        correct,
        acceptance if known else None,
        agreement if known else None,
    )


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    target: TopK | TargetHead | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} mismatch")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not match {hidden.shape[0]} tokens")
    if isinstance(target, TopK):
        wanted = (hidden.shape[0], target.ids.shape[-1])
        if target.ids.shape != wanted or target.log_probs.shape != wanted:
            raise ValueError(
                f"top-k ids {tuple(target.ids.shape)} and log-probabilities "
                f"{tuple(target.log_probs.shape)} do not match {hidden.shape[0]} tokens"
            )
        if target.tail.shape != hidden.shape[:1]:
            raise ValueError(f"tail {tuple(target.tail.shape)} does not match the tokens")
    elif target is not None:
        if target.hidden.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"{target.hidden.shape[0]} hidden states of the target for {hidden.shape[0]} tokens"
            )
        if target.head.weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"the target's head has {target.head.weight.shape[0]} rows, the draft's "
                f"{weight.shape[0]}: different vocabularies"
            )


def dense_head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    objective: Objective | None = None,
    target: TopK | TargetHead | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """The plain formula beside `fused_head_loss`: full tables, autograd's gradients."""
    objective = objective or Objective("ce")
    logits = head_logits(hidden, weight, bias, scale, softcap)
    loss = objective.label_weight * torch.nn.functional.cross_entropy(
        logits, labels, reduction="sum"
    )
    if not objective.divergences or target is None:
        return loss
    q = torch.softmax(logits / temperature, -1)
    if isinstance(target, TargetHead):
        p = torch.softmax(target.head.logits(target.hidden).to(q.dtype) / temperature, -1)
    else:
        stored = torch.cat([target.log_probs, target.tail[:, None]], 1).to(q.dtype)
        p = torch.softmax(stored, -1)
        kept = q.gather(1, target.ids)
        rest = q.scatter(1, target.ids, 0.0).sum(-1, keepdim=True)
        rest = rest.clamp(min=torch.finfo(torch.float32).tiny)  # an empty bucket adds nothing
        q = torch.cat([kept, rest], 1)
    for weight_of, term in objective.divergences.values():
        loss = loss + weight_of * term.reference(p, q).sum()
    return loss


__all__ = ["CHUNK_BYTES", "HeadLoss", "dense_head_loss", "fused_head_loss"]
