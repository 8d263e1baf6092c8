"""Count the parameters of a config's model exactly, without allocating it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Parts of a model by the names of its modules; the first match counts.
_PARTS = (
    ("embeddings", ("embed_tokens", "embed_in", "wte")),
    ("head", ("lm_head", "embed_out")),
    ("attention", ("attn", "attention.")),
    ("feed-forward", ("mlp", "feed_forward")),
)


def count_parameters(config: PretrainedConfig) -> int:
    """Return the exact number of parameters of ``config``'s model, built on the meta device.

    Tied weights count once.
    """
    return sum(parameters_by_part(config).values())


def parameters_by_part(config: PretrainedConfig) -> dict[str, int]:
    """Return the parameters of embeddings, attention, feed-forward, norms and head.

    A tied head counts 0. The other towers of a multimodal model count as ``other``.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts = dict.fromkeys(("embeddings", "attention", "feed-forward", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        if "vision" in name or "multi_modal" in name:
            part = "other"
        elif "norm" in name and "self_attn." not in name and "attention." not in name:
            part = "norms"
        else:
            part = next((p for p, words in _PARTS if any(w in name for w in words)), "other")
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts
