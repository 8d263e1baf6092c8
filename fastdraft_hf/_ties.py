"""Where two greedy texts differ, and near-ties of logits: where they may without a fault.

Two kernels of one precision round logits differently, by up to `LOGIT_TOLERANCE` of the largest.
Where the two best tokens are closer than twice that, either may come first.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """Return the first position at which two sequences differ, ``None`` if they are equal.

    If one is a prefix of the other, that is the position after its end.
    """
    pairs = enumerate(itertools.zip_longest(one, other, fillvalue=None))
    return next((position for position, (a, b) in pairs if a != b), None)


# Largest difference of a logit between two float32 kernels, as a share of the largest logit.
LOGIT_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Margin:
    """How far one logit lies above another.

    Attributes:
        margin: the difference, in logits.
        largest: the largest absolute logit of the position.
    """

    margin: float
    largest: float

    @property
    def tie(self) -> bool:
        """Whether rounding alone can reverse the order of the two."""
        return self.margin <= 2 * LOGIT_TOLERANCE * max(self.largest, 1.0)


def greedy_margin(target: Any, ids: Sequence[int]) -> Margin:
    """Return the margin of a model's best next token over its second best.

    Args:
        target: a PyTorch causal LM.
        ids: the text before the token, unpadded.
    """
    import torch

    with torch.inference_mode():
        inputs = torch.tensor([list(ids)], device=target.device)
        logits = target(input_ids=inputs, logits_to_keep=1).logits[0, -1].float()
    first, second = logits.topk(2).values.tolist()
    return Margin(first - second, float(logits.abs().max()))
