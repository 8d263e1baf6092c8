"""The directions of a target's hidden states that its vocabulary needs most, and tables in them.

A transformer with RMSNorm does not change when its hidden states are rotated and every weight that
reads or writes them is rotated with them (SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024). So the
hidden states x [D] are taken to y = Bᵀ·diag(s)·x [d], with B [D, d] the principal directions of the
vocabulary, and what lies outside them is lost.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from fastdraft_hf.draft.families import FAMILIES
from fastdraft_hf.draft.parts import final_norm, gain_of, logit_multiplier, set_gain, tied

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Standard deviation of the first logits for a hidden state of unit RMS: sharp enough to learn
# from, flat enough not to be confidently wrong.
LOGIT_SPREAD = 2.0


class Basis(NamedTuple):
    """From the target's hidden states to the draft's.

    Attributes:
        directions: B, [D, d], orthonormal columns.
        scale: s, [D].
        share: how much of the vocabulary's sum of squares the directions hold.
    """

    directions: torch.Tensor
    scale: torch.Tensor
    share: float


def vocabulary_basis(target: PreTrainedModel, width: int) -> Basis:
    """Return the basis of a draft of ``width`` for ``target``.

    With E [V, D] the head and g [D] the gain of the final norm, the head sees E·diag(g). Tied
    embeddings are read at both ends, which E·diag(√|g|) serves at once, so s = √|g| then; an
    untied head takes g itself and leaves the hidden states as they are, s = 1.
    """
    import torch

    with torch.no_grad():
        head = target.get_output_embeddings().weight.float()
        gain = gain_of(final_norm(target), head.shape[1]).abs().clamp_min(1e-4)
        scale = gain.sqrt() if tied(target) else torch.ones_like(gain)
        # An RMSNorm takes a common factor out again, so only the differences may remain.
        scale = scale / scale.square().mean().sqrt()
        table = head * (scale if tied(target) else gain)
        values, vectors = torch.linalg.eigh((table.T @ table).double())
    share = float(values[-width:].sum() / values.sum())
    return Basis(vectors.flip(1)[:, :width].float(), scale, share)


def project_vocabulary(target: PreTrainedModel, draft: PreTrainedModel, basis: Basis) -> None:
    """Set the draft's embeddings, head and final gain from the target's, in ``basis``."""
    import torch

    # Some families multiply embeddings by the root of the width, which is smaller in the draft.
    wider, width = basis.directions.shape
    factor = math.sqrt(wider / width) if FAMILIES[draft.config.model_type].scaled_embeddings else 1
    with torch.no_grad():
        source, ours = target.get_output_embeddings(), draft.get_output_embeddings()
        head = source.weight.float()
        if not tied(target):
            head = head * gain_of(final_norm(target), wider)
            embeddings = target.get_input_embeddings().weight.float()
            draft.get_input_embeddings().weight.copy_(factor * (embeddings @ basis.directions))
        table = factor * ((head * basis.scale) @ basis.directions)
        ours.weight.copy_(table)
        if getattr(source, "bias", None) is not None and getattr(ours, "bias", None) is not None:
            ours.bias.copy_(source.bias)
        spread = float(table.std()) * math.sqrt(table.shape[1])
        gain = LOGIT_SPREAD / (spread * logit_multiplier(draft.config))
        if not set_gain(final_norm(draft), gain) and not tied(draft):
            ours.weight.mul_(gain)
