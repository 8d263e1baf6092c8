"""Where the target's distribution comes from: stored top-k log-probabilities, or its hidden states.

Stored, a position costs k ids, k log-probabilities in float16 and the logarithm of what is left of
the mass, instead of V numbers. The rest is one more outcome, a bucket, so the k + 1 numbers are a
distribution again and every divergence is defined; `objectives.base` says what is exact over
buckets and what is a bound.

Shapes: N tokens that carry loss, H hidden size, V vocabulary, k stored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Logarithm of the least mass a bucket has: rkl stays finite where nothing was left over, and an
# empty bucket adds nothing (float32's least normal number is exp(-87.3)).
FLOOR = -87.0


@dataclass(frozen=True)
class TopK:
    """The target's k most probable tokens and the rest as one bucket.

    Attributes:
        ids: [N, k] int64, every id once.
        log_probs: [N, k], natural logarithms, any float type.
        tail: [N], logarithm of the mass of all other tokens; any value at or below `FLOOR` stands
            for none.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    tail: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows], self.tail[rows])

    def buckets(self) -> torch.Tensor:
        """Return log p [N, k + 1], the rest last, normalised: float16 lost a little of the sum."""
        stored = torch.cat([self.log_probs.float(), self.tail.float()[:, None]], 1)
        return torch.log_softmax(stored.clamp(min=FLOOR), -1)

    def first(self) -> torch.Tensor:
        """Return the most probable id [N, 1]."""
        return self.ids.gather(1, self.log_probs.argmax(-1, keepdim=True))


@dataclass(frozen=True)
class TargetHead:
    """The target's last hidden states and its head: the whole distribution, made chunk by chunk.

    Attributes:
        hidden: [N, H] (the target's H).
        weight: [V, H].
        bias: [V].
        scale, softcap: as for the draft's head.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __getitem__(self, rows: slice | torch.Tensor) -> TargetHead:
        return TargetHead(self.hidden[rows], self.weight, self.bias, self.scale, self.softcap)

    def logits(self) -> torch.Tensor:
        """Return [N, V] in float32."""
        return head_logits(self.hidden, self.weight, self.bias, self.scale, self.softcap).float()


def head_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return ``softcap·tanh(scale·(hidden @ weight.T + bias) / softcap)`` [N, V].

    Granite divides its logits (``logits_scaling``), Cohere multiplies them, Gemma 2 caps them.
    """
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def top_k_of(
    logits: torch.Tensor, k: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids [N, k] (most probable first), log-probabilities [N, k] and the rest's [N].

    Args:
        logits: [N, V].
        k: tokens to keep, at most V.
        temperature: logits are divided by it first.
    """
    log_probs = torch.log_softmax(logits.float() / temperature, -1)
    values, ids = log_probs.topk(k, -1)
    # Summed over the rest itself: 1 − Σ would lose a small rest to rounding.
    tail = log_probs.scatter(1, ids, float("-inf")).logsumexp(-1).clamp(min=FLOOR)
    return ids, values, tail
