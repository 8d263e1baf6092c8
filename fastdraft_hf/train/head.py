"""The objective over a language-model head in one pass, never holding [tokens, vocabulary].

For a draft of 10M parameters and a vocabulary of 49k, the head is nine tenths of the work of
training. Chunk by chunk of tokens, the forward pass computes the logits, every term's value and
the gradients, and keeps only the gradients. The projection is done once (a checkpointed head
repeats it in the backward pass), and memory does not grow with tokens x vocabulary.

Shapes: N tokens that carry loss, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_logits
from fastdraft_hf.train.chunks import Chunks, add_product
from fastdraft_hf.train.distribution import TargetHead, TopK
from fastdraft_hf.train.objectives import Objective

# Bytes of a chunk's logits in float32, so that memory is the same for every vocabulary: 256 tokens
# of 49k. With the target's full distribution a chunk has several such tables.
CHUNK_BYTES = 256 * 49_152 * 4
_CHUNK_BYTES_FULL = CHUNK_BYTES // 4
# oneDNN keeps a kernel and its workspace (some 20 MB with a large vocabulary) for each of the last
# 1,024 shapes of bfloat16 products on a CPU. Multiples of this keep the shapes few.
_ROWS_STEP = 64


class HeadLoss(NamedTuple):
    """The head's output, summed over tokens.

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
        settings: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        objective, target, temperature, scale, softcap, chunk, dtype = settings
        wants = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants[2] else None
        )
        projection = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        step = _ROWS_STEP if hidden.device.type == "cpu" and dtype != torch.float32 else 1
        size = min(chunk, -(-hidden.shape[0] // step) * step)
        chunks = Chunks(objective, temperature, (size, weight.shape[0]), dtype, hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].to(dtype)
            count = part.shape[0]
            extra = min(chunk, -(-count // step) * step) - count
            if extra:
                part = torch.nn.functional.pad(part, (0, 0, 0, extra))
            table = chunks.table("logits", count + extra)
            logits = head_logits(part, projection, offset, scale, softcap, out=table)[:count]
            gradient = chunks.gradient(
                logits, labels[rows, None], None if target is None else target[rows]
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
                padded = chunks.table("padded", count + extra)
                padded[:count], padded[count:] = gradient, 0.0
                gradient = padded
            if grad_hidden is not None:
                grad_hidden[rows] = (gradient @ projection)[:count]
            if grad_weight is not None:
                add_product(grad_weight, gradient, part)
        # Not `save_for_backward`: released here, a gradient becomes the parameter's own instead of
        # being copied.
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        sums = chunks.sums()
        ctx.mark_non_differentiable(sums)
        return chunks.loss(), sums

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the head's gradients were used; call the loss again for a second pass"
            )
        grads, ctx.gradients = ctx.gradients, None
        if grads[0] is not None:
            grads[0] = grads[0] * grad_loss.to(grads[0].dtype)
        for i in (1, 2):
            if grads[i] is not None:
                grads[i] = grads[i].mul_(grad_loss).to(ctx.dtypes[i])
        return *grads, None, None


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
        dtype: of the matrix products; ``hidden``'s by default. Sums stay in float32. float16 is
            replaced by float32: half of a softmax over a vocabulary underflows in float16.

    Raises:
        FastDraftError: hidden states, labels and distribution are not of the same tokens, or a
            term needs a distribution and there is none.
    """
    objective = objective or Objective("ce")
    shapes = [tuple(hidden.shape[:-1]), tuple(labels.shape)]
    if target is not None:
        of_target = target.ids if isinstance(target, TopK) else target.hidden
        shapes.append(tuple(of_target.shape[:-1]))
    if any(shape != (len(hidden),) for shape in shapes):
        raise FastDraftError(f"hidden states, labels and distribution are of {shapes} tokens")
    if objective.needs_distribution and target is None:
        raise FastDraftError(f"objective {objective} needs the target's distribution")
    dtype = dtype or hidden.dtype
    if dtype == torch.float16:
        dtype = torch.float32
    if chunk is None:
        table = _CHUNK_BYTES_FULL if isinstance(target, TargetHead) else CHUNK_BYTES
        chunk = max(16, table // (4 * weight.shape[0]))
    settings = (objective, target, temperature, scale, softcap, chunk, dtype)
    # Under autocast the products would be in its type, whatever `dtype` says.
    with torch.autocast(hidden.device.type, enabled=False):
        loss, sums = _FusedHead.apply(hidden, weight, bias, labels, settings)  # type: ignore[no-untyped-call]
    *values, correct, acceptance, agreement = sums
    terms = dict(zip(objective.weights, values, strict=True))
    if target is None:
        return HeadLoss(loss, terms, correct, None, None)
    return HeadLoss(loss, terms, correct, acceptance, agreement)
