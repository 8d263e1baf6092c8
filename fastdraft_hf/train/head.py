"""The objective over a language-model head in one pass, never holding [tokens, vocabulary].

For a draft of 10M parameters and a vocabulary of 49k, the head is nine tenths of the work of
training. Chunk by chunk of tokens, the forward pass computes the logits, every term's value and
the gradients, and keeps only the gradients, so the projection is done once and not again in the
backward pass (as a checkpointed head does), and memory does not grow with tokens x vocabulary.

Shapes: N tokens that carry loss, H hidden size, V vocabulary, B outcomes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_logits
from fastdraft_hf.train.chunks import Sums, Tables, add_product, logits_gradient
from fastdraft_hf.train.distribution import TargetHead, TopK
from fastdraft_hf.train.objectives import Objective

# Bytes of a chunk's logits in float32, so that memory is the same for every vocabulary: 256 tokens
# of 49k. With the target's full distribution at hand a chunk has several such tables.
CHUNK_BYTES = 256 * 49_152 * 4
_CHUNK_BYTES_FULL = CHUNK_BYTES // 4
# A CPU's products in bfloat16 keep a kernel and its workspace (some 20 MB with a large vocabulary)
# for each of the last 1,024 shapes (oneDNN's primitive cache), so the rows of a product are few
# different numbers: a full chunk, or multiples of this.
_ROWS_STEP = 64


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
        sums = Sums(objective, hidden.device)
        step = _ROWS_STEP if hidden.device.type == "cpu" and dtype != torch.float32 else 1
        size = min(chunk, -(-hidden.shape[0] // step) * step)
        tables = Tables(size, weight.shape[0], hidden, dtype)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].to(dtype)
            count = part.shape[0]
            extra = min(chunk, -(-count // step) * step) - count
            if extra:
                part = torch.nn.functional.pad(part, (0, 0, 0, extra))
            table = tables.take("logits", count + extra)
            logits = head_logits(part, projection, offset, scale, softcap, out=table)[:count]
            gradient = logits_gradient(
                logits,
                tables,
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
                gradient *= logits.div_(softcap).square_().neg_().add_(1)
            if scale != 1.0:
                gradient *= scale
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=torch.float32)
            if extra:
                padded = tables.take("padded", count + extra)
                padded[:count], padded[count:] = gradient, 0.0
                gradient = padded
            if grad_hidden is not None:
                grad_hidden[rows] = (gradient @ projection)[:count]
            if grad_weight is not None:
                add_product(grad_weight, gradient, part)
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
        FastDraftError: the shapes do not belong together, a number is out of its range, or a term
            needs a distribution and there is none.
    """
    objective = objective or Objective("ce")
    _check(hidden, weight, labels, target)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise FastDraftError(f"bias {tuple(bias.shape)} does not match {weight.shape[0]} ids")
    if not 0 < temperature < float("inf"):
        raise FastDraftError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise FastDraftError(f"softcap must be above 0, got {softcap}")
    if chunk is not None and chunk < 1:
        raise FastDraftError(f"chunk must be at least 1, got {chunk}")
    dtype = dtype or hidden.dtype
    if dtype == torch.float16:
        dtype = torch.float32
    if objective.needs_distribution and target is None:
        raise FastDraftError(f"objective {objective} needs the target's distribution")
    if chunk is None:
        table = _CHUNK_BYTES_FULL if isinstance(target, TargetHead) else CHUNK_BYTES
        chunk = max(16, table // (4 * weight.shape[0]))
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
        raise FastDraftError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} mismatch"
        )
    if labels.shape != hidden.shape[:1]:
        raise FastDraftError(f"labels {tuple(labels.shape)} do not match {hidden.shape[0]} tokens")
    if isinstance(target, TopK):
        wanted = (hidden.shape[0], target.ids.shape[-1])
        if target.ids.shape != wanted or target.log_probs.shape != wanted:
            raise FastDraftError(
                f"top-k ids {tuple(target.ids.shape)} and log-probabilities "
                f"{tuple(target.log_probs.shape)} do not match {hidden.shape[0]} tokens"
            )
        if target.tail.shape != hidden.shape[:1]:
            raise FastDraftError(f"tail {tuple(target.tail.shape)} does not match the tokens")
    elif target is not None:
        if target.hidden.shape[0] != hidden.shape[0]:
            raise FastDraftError(
                f"{target.hidden.shape[0]} hidden states of the target for {hidden.shape[0]} tokens"
            )
        if target.head.weight.shape[0] != weight.shape[0]:
            raise FastDraftError(
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
