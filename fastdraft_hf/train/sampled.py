"""Sampled softmax: a step scores the ids that occur in it and a few random others.

Of the softmax's denominator the part of the ids that occur in the batch, as labels or in the
target's stored distribution, is summed exactly. The sum over the R other ids is estimated from m of
them, drawn uniformly without replacement; each stands for R / m ids, which adds log(R / m) to its
logit. Processes share one batch, so they score the same ids: all that occur in any of them, and one
common draw. (Bengio and Senécal 2008, IEEE Trans. Neural Networks 19(4), equation 7, with uniform
proposals and what occurs always included; Jean et al. 2015, arXiv:1412.2007, section 3.)

Shapes: N tokens that carry loss, H hidden size, V vocabulary, C ids that are scored, k stored.
"""

import math
from typing import NamedTuple

import torch

from fastdraft_hf.train.distribution import TopK


class SampledHead(NamedTuple):
    """The head's rows of the scored ids, and the batch with positions in ``ids`` instead of ids.

    Attributes:
        ids: [C], ascending.
        weight: [C, H], differentiable by the whole weight.
        bias: [C], with log(R / m) for drawn ids.
        labels: [N].
        target: the stored distribution, if there is one.
    """

    ids: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    labels: torch.Tensor
    target: TopK | None


def sample_head(
    weight: torch.Tensor,
    labels: torch.Tensor,
    negatives: int,
    bias: torch.Tensor | None = None,
    *,
    target: TopK | None = None,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    shared: bool = False,
    sparse: bool = False,
) -> SampledHead:
    """Return the head over the batch's ids and ``negatives`` others.

    Args:
        weight: [V, H].
        labels: [N].
        negatives: how many ids are drawn; if fewer are left, all of them are.
        bias: [V].
        target: the stored distribution of the N tokens; its ids are scored too.
        scale: of the logits (`fused_head_loss`): the bias is given before it.
        generator: of the draw, on the CPU; PyTorch's own by default.
        shared: whether all processes take part, with generators of the same state.
        sparse: whether the gradient of ``weight`` is sparse.
    """
    size = weight.shape[0]
    occurs = torch.zeros(size, dtype=torch.bool, device=weight.device)
    occurs[labels] = True
    if target is not None:
        occurs[target.ids.reshape(-1)] = True
    if shared:
        everywhere = occurs.to(torch.uint8)
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MAX)
        occurs = everywhere.bool()
    others = (~occurs).nonzero()[:, 0]
    drawn = others
    if negatives < len(others):
        order = torch.randperm(len(others), generator=generator)[:negatives]
        drawn = others[order.to(others.device)]
    scored = occurs.clone()
    scored[drawn] = True
    ids = scored.nonzero()[:, 0]
    positions = torch.empty(size, dtype=torch.int64, device=weight.device)
    positions[ids] = torch.arange(len(ids), device=weight.device)
    stands_for = math.log(len(others) / len(drawn)) if len(drawn) else 0.0
    offset = weight.new_full((len(ids),), stands_for / scale, dtype=torch.float32)
    offset.masked_fill_(occurs[ids], 0.0)
    if bias is not None:
        offset = offset + bias[ids]
    if target is not None:
        target = TopK(positions[target.ids], target.log_probs, target.tail)
    scored_weight = torch.nn.functional.embedding(ids, weight, sparse=sparse)
    return SampledHead(ids, scored_weight, offset, positions[labels], target)
