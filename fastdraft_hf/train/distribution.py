"""The target's distribution: stored top-k log-probabilities, or the target's hidden states.

Shapes: N tokens that carry loss, H hidden size, V vocabulary, k stored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdraft_hf._head import Head
from fastdraft_hf.data.target_logits import FLOOR


@dataclass(frozen=True)
class TopK:
    """The target's k most probable tokens, and the tail as one more outcome.

    The k + 1 outcomes are a distribution again, so every divergence is defined; `objectives` says
    what is exact over them and what is a bound.

    Attributes:
        ids: [N, k] int64, every id once.
        log_probs: [N, k], natural logarithms, any float type.
        tail: [N], logarithm of the mass of all other tokens; at or below `FLOOR` there is none.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    tail: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows], self.tail[rows])

    def buckets(self) -> torch.Tensor:
        """Return log p [N, k + 1], the tail last, normalized: float16 lost some of the sum."""
        stored = torch.cat([self.log_probs.float(), self.tail.float()[:, None]], 1)
        return torch.log_softmax(stored.clamp(min=FLOOR), -1)

    def first(self) -> torch.Tensor:
        """Return the most probable id [N, 1]."""
        return self.ids.gather(1, self.log_probs.argmax(-1, keepdim=True))


@dataclass(frozen=True)
class TargetHead:
    """The target's last hidden states [N, H] and its head, whose logits are made by chunks."""

    hidden: torch.Tensor
    head: Head

    def __getitem__(self, rows: slice | torch.Tensor) -> TargetHead:
        return TargetHead(self.hidden[rows], self.head)

    def logits(self) -> torch.Tensor:
        """Return [N, V] in float32."""
        return self.head.logits(self.hidden).float()
