"""Cross-entropy over a language-model head in one pass, never holding [tokens, vocabulary].

For a draft of 10M parameters and a vocabulary of 49k, the head is nine tenths of the work of
training. Chunk by chunk of tokens, the forward pass computes the logits, the loss and both
gradients, and keeps only the gradients, so the projection is done once and not again in the
backward pass (as a checkpointed head does), and memory does not grow with tokens x vocabulary.

Shapes: N tokens that carry loss, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

CHUNK_TOKENS = 512


class HeadLoss(NamedTuple):
    """What the head gave.

    Attributes:
        loss: scalar, the sum of the tokens' cross-entropies in nats; differentiable.
        correct: scalar, how many labels were the head's first choice (ties count as chosen).
    """

    loss: torch.Tensor
    correct: torch.Tensor


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
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
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk].to(dtype)
            target = labels[start : start + chunk, None]
            logits = part @ projection.T
            if bias is not None:
                logits = logits + bias.to(dtype)
            if scale != 1.0:
                logits = logits * scale
            if softcap is not None:
                bounded = torch.tanh(logits / softcap)
                logits = bounded * softcap
            chosen, highest = logits.gather(1, target), logits.amax(-1, keepdim=True)
            correct += (chosen >= highest).sum()
            # Softmax sums in float32 inside, whatever its type. The log of the sum of exponentials
            # follows from the most probable token, whose probability cannot underflow.
            gradient = torch.softmax(logits, -1)
            log_sum = highest.float() - gradient.amax(-1, keepdim=True).float().log()
            loss += (log_sum - chosen.float()).sum(dtype=torch.float64)
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            # From here on `gradient` becomes that of the loss by the raw projection.
            gradient.scatter_add_(1, target, torch.full_like(chosen, -1.0))
            if softcap is not None:
                gradient *= 1 - bounded.square()
            if scale != 1.0:
                gradient *= scale
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = gradient @ projection
            if grad_weight is not None:
                grad_weight += gradient.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(correct)
        return loss.float(), correct

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * grad_loss).to(bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def fused_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK_TOKENS,
    dtype: torch.dtype | None = None,
) -> HeadLoss:
    """Return the summed cross-entropy of ``labels`` under a language-model head.

    The logits are ``scale * (hidden @ weight.T + bias)``, soft-capped to
    ``softcap * tanh(logits / softcap)`` when a cap is given (Gemma 2).

    Args:
        hidden: [N, H], the last hidden states of the tokens that carry loss.
        weight: [V, H], the head's weights, tied or not.
        labels: [N], the ids to predict (already shifted), none of them ignored.
        bias: [V].
        scale: factor of the logits (Granite divides by ``logits_scaling``, Cohere multiplies).
        softcap: cap of the logits.
        chunk: tokens at a time; memory is ``chunk * V`` floats.
        dtype: of the matrix products; ``hidden``'s by default. Sums stay in float32.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} mismatch")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} do not match {hidden.shape[0]} tokens")
    loss, correct = _FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, scale, softcap, chunk, dtype or hidden.dtype
    )
    return HeadLoss(loss, correct)


def dense_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """The plain formula beside `fused_cross_entropy`: full logits, autograd's gradients."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
