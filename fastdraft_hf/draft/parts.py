"""The parts of a decoder that initialization are put into, whatever its family calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the module that holds the layers and the final norm."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else model.base_model


def final_norm(model: PreTrainedModel) -> Any:
    """Return the norm before the head."""
    norms = [m for name, m in decoder_of(model).named_children() if "norm" in name]
    return norms[-1]


def tied(model: PreTrainedModel) -> bool:
    """Return whether the head is the embeddings."""
    return bool(model.config.get_text_config().tie_word_embeddings)


def gain_of(norm: Any, width: int) -> torch.Tensor:
    """Return what a norm multiplies normalised states by, [width], in float32.

    Most keep it as ``weight``; Gemma's and Nemotron's keep it less one; OLMo's has none.
    """
    import torch

    if getattr(norm, "weight", None) is None:
        return torch.ones(width)
    gain: torch.Tensor = norm.weight.detach().float() + _offset(norm)
    return gain


def set_gain(norm: Any, gain: torch.Tensor | float) -> bool:
    """Set what `gain_of` returns, and a bias to 0. Returns False where the norm has no gain."""
    import torch

    if getattr(norm, "weight", None) is None:
        return False
    with torch.no_grad():
        value = torch.as_tensor(gain, dtype=norm.weight.dtype) - _offset(norm)
        norm.weight.copy_(value.expand_as(norm.weight))
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
    return True


def _offset(norm: Any) -> float:
    """Return 1 where a weight of 0 means a gain of 1. The norm itself is asked."""
    import torch

    with torch.no_grad():
        weight = norm.weight
        signs = torch.ones_like(weight)
        signs[..., 1::2] = -1  # of mean 0 and mean square 1: both kinds of norm leave it alone
        gain = (norm(signs[None]) - norm(-signs[None]))[0] / 2 * signs
        return float(round(float((gain - weight).float().median())))


def logit_multiplier(config: Any) -> float:
    """Return what a family multiplies its logits by (Cohere, Granite), 1 for the others."""
    return float(getattr(config, "logit_scale", 1.0) or 1.0) / float(
        getattr(config, "logits_scaling", 1.0) or 1.0
    )
