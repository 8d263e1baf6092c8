"""A draft's config from a target's: the same architecture, scaled down to a parameter budget."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.drafts.config import DesignConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Decoder families whose configs are scaled by the fields used below. Others are refused rather
# than scaled by guess.
SUPPORTED_FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")

# Those whose projections are fused into one matrix, which `slice` does not take apart.
FUSED_FAMILIES = ("phi3",)


def count_parameters(config: PretrainedConfig) -> int:
    """Return the exact number of parameters of ``config``'s model, made on the meta device.

    Tied weights count once. No memory is taken.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def design_draft(target_config: PretrainedConfig, design: DesignConfig) -> PretrainedConfig:
    """Return the config of a draft for ``target_config``.

    The vocabulary, tied or untied heads, rope settings, head size, activation, norms and special
    tokens are the target's; depth and widths are scaled. Without a given ``hidden_size`` the
    widest multiple of ``width_multiple`` whose model stays within ``params`` is taken.

    Raises:
        FastDraftError: the family is not supported, or the budget cannot hold the vocabulary.
    """
    family = target_config.model_type
    if family not in SUPPORTED_FAMILIES:
        raise FastDraftError(
            f"target: family '{family}' has no draft design yet; supported: "
            + ", ".join(SUPPORTED_FAMILIES)
        )
    if design.first_weights == "slice" and family in FUSED_FAMILIES:
        raise FastDraftError(
            f"design.first_weights: layers of family '{family}' cannot be sliced; use project"
        )
    if design.hidden_size is not None:
        if design.hidden_size > target_config.hidden_size:
            raise FastDraftError(
                f"design.hidden_size: {design.hidden_size} is wider than the target's "
                f"{target_config.hidden_size}"
            )
        config = _scaled(target_config, design, design.hidden_size)
        if design.hidden_size % config.num_attention_heads:
            raise FastDraftError(
                f"design.hidden_size: {design.hidden_size} is no multiple of the "
                f"{config.num_attention_heads} attention heads it would have"
            )
        return config
    step = design.width_multiple
    widths = range(step, target_config.hidden_size + 1, step)
    best, least = None, None
    for width in widths:
        config = _scaled(target_config, design, width)
        if width % config.num_attention_heads:  # configs insist on it, whatever the head size
            continue
        size = count_parameters(config)
        least = size if least is None else least
        if size > design.params:
            break
        best = config
    if least is None:
        raise FastDraftError(
            f"design.width_multiple: no multiple of {step} up to the target's width of "
            f"{target_config.hidden_size} can be divided among its heads"
        )
    if best is None:
        raise FastDraftError(
            f"design.params: {design.params:,} cannot hold a vocabulary of "
            f"{target_config.vocab_size:,} tokens; the least, {step} wide, is {least:,}"
        )
    return best


def _scaled(target: Any, design: DesignConfig, width: int) -> PretrainedConfig:
    draft = copy.deepcopy(target)
    layers = design.num_hidden_layers
    wanted = design.intermediate_size
    if design.first_weights == "slice" and wanted and wanted > target.intermediate_size:
        raise FastDraftError(
            f"design.intermediate_size: {wanted} is wider than the target's "
            f"{target.intermediate_size}, which a slice is cut from"
        )
    if layers > target.num_hidden_layers:
        raise FastDraftError(
            f"design.num_hidden_layers: {layers} is deeper than the target's "
            f"{target.num_hidden_layers}"
        )
    # The head size stays, because rope's frequencies belong to it; the number of heads shrinks
    # with the width, in whole groups of the target's grouped-query ratio.
    head_dim = getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads
    ratio = target.num_attention_heads // target.num_key_value_heads
    if design.first_weights == "slice":
        # A cut layer keeps as much of the target's inner widths as there can be: all of the
        # feed-forward, and the most groups of heads that a config of this width allows.
        fitting = [g for g in range(1, target.num_key_value_heads + 1) if width % (g * ratio) == 0]
        groups = max(fitting, default=1)
        inner = target.intermediate_size
    else:
        groups = max(1, round(width / head_dim / ratio))
        inner = _rounded(width * target.intermediate_size / target.hidden_size, 32)
    draft.hidden_size = width
    draft.num_hidden_layers = layers
    draft.num_attention_heads = groups * ratio
    draft.num_key_value_heads = groups
    draft.head_dim = head_dim
    draft.intermediate_size = design.intermediate_size or inner
    # Lists with an entry a layer are thinned evenly, as the layers are.
    kept = kept_layers(target.num_hidden_layers, layers)
    for name in ("layer_types", "no_rope_layers"):
        value = getattr(target, name, None)
        if isinstance(value, (list, tuple)) and len(value) == target.num_hidden_layers:
            setattr(draft, name, [value[i] for i in kept])
    if hasattr(draft, "max_window_layers"):
        draft.max_window_layers = min(draft.max_window_layers, layers)
    for name in ("quantization_config", "_name_or_path"):
        if name in draft.__dict__:
            delattr(draft, name)
    return draft


def kept_layers(total: int, kept: int) -> list[int]:
    """Return the indices of ``kept`` layers out of ``total``: evenly spaced, ends included."""
    if kept == 1:
        return [0]
    return [round(i * (total - 1) / (kept - 1)) for i in range(kept)]


def _rounded(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
