"""The principal directions of a target's vocabulary, and its embeddings and head in them.

A transformer with RMSNorm computes the same function when its hidden states are rotated and every
weight that reads or writes them is rotated too (SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024).
Hidden states x [D] become y = Bᵀ·diag(s)·x [d], where B [D, d] holds the principal directions of
the vocabulary. What lies outside them is lost.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdraft_hf._head import head_of
from fastdraft_hf.draft.families import FAMILIES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Standard deviation of the initial logits for a hidden state of unit RMS: sharp enough to learn
# from, flat enough not to be confidently wrong.
LOGIT_SPREAD = 2.0


class Basis(NamedTuple):
    """A map from the target's hidden states to the draft's.

    Attributes:
        directions: B, [D, d], orthonormal columns.
        scale: s, [D].
        share: share of the vocabulary's sum of squares that the directions hold.
    """

    directions: torch.Tensor
    scale: torch.Tensor
    share: float


def vocabulary_basis(target: PreTrainedModel, width: int) -> Basis:
    """Return the basis of a draft of ``width`` for ``target``.

    With E [V, D] the head's weight and g [D] the gain of the final norm, the head computes with
    E·diag(g). A tied matrix is used at both ends, and E·diag(√|g|) serves both, so s = √|g|. An
    untied head takes g itself and s = 1.
    """
    import torch

    with torch.no_grad():
        head = target.get_output_embeddings().weight.float()
        gain = gain_of(final_norm(target), head).abs().clamp_min(1e-4)
        scale = gain.sqrt() if tied(target) else torch.ones_like(gain)
        # RMSNorm removes a common factor, so only the differences between channels may remain.
        scale = scale / scale.square().mean().sqrt()
        table = head * (scale if tied(target) else gain)
        values, vectors = torch.linalg.eigh((table.T @ table).double())
    share = float(values[-width:].sum() / values.sum())
    return Basis(vectors.flip(1)[:, :width].float(), scale, share)


def project_vocabulary(target: PreTrainedModel, draft: PreTrainedModel, basis: Basis) -> None:
    """Set the draft's embeddings, head and final gain from the target's, in ``basis``."""
    import torch

    wider, width = basis.directions.shape
    # Some families multiply embeddings by the square root of the width.
    factor = math.sqrt(wider / width) if FAMILIES[draft.config.model_type].scaled_embeddings else 1
    with torch.no_grad():
        source, ours = target.get_output_embeddings(), draft.get_output_embeddings()
        head = source.weight.float()
        if not tied(target):
            head = head * gain_of(final_norm(target), head)
            embeddings = target.get_input_embeddings().weight.float()
            draft.get_input_embeddings().weight.copy_(factor * (embeddings @ basis.directions))
        table = factor * ((head * basis.scale) @ basis.directions)
        ours.weight.copy_(table)
        if getattr(source, "bias", None) is not None and getattr(ours, "bias", None) is not None:
            ours.bias.copy_(source.bias)
        spread = float(table.std()) * math.sqrt(table.shape[1])
        gain = LOGIT_SPREAD / (spread * head_of(draft).scale)
        if not set_gain(final_norm(draft), gain) and not tied(draft):
            ours.weight.mul_(gain)


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the module that holds the layers and the final norm."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else model.base_model


def final_norm(model: PreTrainedModel) -> Any:
    """Return the norm before the head."""
    return [m for name, m in decoder_of(model).named_children() if "norm" in name][-1]


def tied(model: PreTrainedModel) -> bool:
    """Return whether embeddings and head share their weight."""
    return bool(model.config.get_text_config().tie_word_embeddings)


def gain_of(norm: Any, table: torch.Tensor) -> torch.Tensor:
    """Return the factors [D] by which a norm multiplies normalized states, in float32.

    Most families store it as ``weight``, Gemma and Nemotron store it minus one, OLMo has none.

    Args:
        norm: the norm.
        table: [.., D], a weight beside the norm, for the width and the device.
    """
    import torch

    if getattr(norm, "weight", None) is None:
        return torch.ones(table.shape[-1], device=table.device)
    gain: torch.Tensor = norm.weight.detach().float() + _offset(norm)
    return gain


def set_gain(norm: Any, gain: torch.Tensor | float) -> bool:
    """Set the gain of a norm and its bias to 0; return False where the norm has no gain."""
    import torch

    if getattr(norm, "weight", None) is None:
        return False
    with torch.no_grad():
        value = torch.as_tensor(gain).to(norm.weight) - _offset(norm)
        norm.weight.copy_(value.expand_as(norm.weight))
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
    return True


def _offset(norm: Any) -> float:
    """Return 1 where a weight of 0 means a gain of 1, measured on the norm itself."""
    import torch

    with torch.no_grad():
        weight = norm.weight
        signs = torch.ones_like(weight)
        # Mean 0 and mean square 1: neither LayerNorm nor RMSNorm changes it.
        signs[..., 1::2] = -1
        gain = (norm(signs[None]) - norm(-signs[None]))[0] / 2 * signs
        return float(round(float((gain - weight).float().median())))
