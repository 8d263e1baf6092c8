"""What our loop cannot do, and whether stock assisted generation can."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.decode.cached import CACHE_NAME
from fastdraft_hf.decode.scores import BY_ROW_NUMBER, STATEFUL

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

# What `generate` passes on to any decoding method; anything else is for a model of another kind.
_KNOWN = {
    "attention_mask",
    "position_ids",
    CACHE_NAME,
    "use_cache",
    "logits_to_keep",
    "cache_position",
}


def is_openvino(model: Any) -> bool:
    """Return whether a model is optimum-intel's, without importing it."""
    return any(c.__module__.startswith("optimum.intel.openvino") for c in type(model).__mro__)


def obstacle(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    config: GenerationConfig,
    draft: PreTrainedModel | None,
    draft_tokenizer: Any,
    synced_gpus: bool,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> tuple[str | None, bool]:
    """Return why the loop cannot do this, if so, and whether stock decoding can use the draft."""
    rows = input_ids.shape[0]
    if draft is None:
        return "no assistant_model was given", False
    mode = config.get_generation_mode(None)
    if mode not in ("greedy_search", "sample"):
        return f"{mode.replace('_', ' ')} takes no draft", False
    stock_assists = not is_openvino(model) and not is_openvino(draft) and rows == 1
    if model.config.is_encoder_decoder or draft.config.is_encoder_decoder:
        return "encoder-decoder models are not supported", stock_assists
    if draft_tokenizer is not None:
        return "target and draft have different tokenizers", stock_assists
    ours, theirs = (m.config.get_text_config().vocab_size for m in (model, draft))
    if ours != theirs:
        raise FastDraftError(
            f"the draft's vocabulary has {theirs} tokens and the target's {ours}; a draft must use "
            "the target's own tokenizer"
        )
    if draft is model and is_openvino(model):
        return "an OpenVINO model cannot draft for itself: it has one cache", False
    if synced_gpus:
        return "models spread over processes are not supported", stock_assists
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions and hidden states are not kept", stock_assists
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        return "assistant_ensemble_weight is not supported", stock_assists
    further = sorted(k for k, v in model_kwargs.items() if v is not None and k not in _KNOWN)
    if further or not input_ids.shape[1]:
        return f"inputs {', '.join(further) or 'without ids'} are not supported", stock_assists
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        return "positions of several dimensions are not supported", stock_assists
    span = input_ids.shape[1], int(config.max_length)
    for one in (model, draft):
        if is_openvino(one) and not getattr(one, "stateful", False):
            return f"{type(one).__name__} keeps its cache outside", False
        if not is_openvino(one) and not _plain(one, *span):
            return f"{type(one).__name__} prepares inputs of its own", stock_assists
    if (rows > 1 or is_openvino(model)) and not _can_hide(model, span[1]):
        return f"{type(model).__name__} tells distances by places of the cache", stock_assists
    cache = model_kwargs.get(CACHE_NAME)
    if not is_openvino(model):
        if not model_kwargs.get("use_cache", True) or not _can_roll_back(cache, rows):
            return "it needs a dynamic cache that tokens can be taken back from", False
        if cache is not None and cache.get_seq_length() >= input_ids.shape[1]:
            return "the cache holds the whole prompt", stock_assists
    names = {type(p).__name__ for p in processors}
    if names & STATEFUL:
        return f"{', '.join(sorted(names & STATEFUL))} cannot take tokens back", False
    if rows > 1 and names & BY_ROW_NUMBER:
        return f"{', '.join(sorted(names & BY_ROW_NUMBER))} needs whole batches", False
    if rows > 1 and streamer is not None:
        return "rows of a batch come at different times, which a streamer cannot tell", False
    return None, True


def _plain(model: PreTrainedModel, first: int, last: int) -> bool:
    """Return whether ids, mask, positions and a key-value cache are all the model reads.

    Args:
        model: a PyTorch model.
        first, last: lengths of the text from prompt to end.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if not all("attention" in kind and "linear" not in kind for kind in kinds):
        return False
    own = getattr(type(model), "prepare_inputs_for_generation", None)
    if own is GenerationMixin.prepare_inputs_for_generation:
        return True
    # Phi-3 recomputes its cache where the text outgrows its short rotary factors, and only there.
    limit = getattr(config, "original_max_position_embeddings", None) or last
    return config.model_type in ("phi3", "phimoe") and not first <= limit < last


def _can_hide(model: PreTrainedModel, last: int) -> bool:
    """Return whether hidden slots change nothing: positions are told, and no window counts slots.

    Args:
        model: the target. What a draft makes of hidden slots changes acceptance, not the output.
        last: length of the text at its end.
    """
    names = model.input_names if is_openvino(model) else inspect.signature(model.forward).parameters
    if "position_ids" not in names:
        return False
    config = model.config.get_text_config()
    windowed = getattr(config, "use_sliding_window", True) is not False
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    # Slots outnumber tokens by what is hidden before a compaction.
    slots = 1.5 * last + 256
    return not windowed or all(window is None or window > slots for window in windows)


def _can_roll_back(cache: Any, rows: int) -> bool:
    if not isinstance(cache, DynamicCache):
        return False
    kinds = {type(layer) for layer in cache.layers}
    if rows == 1 and hasattr(cache, "activate_past_recording"):
        kinds.discard(DynamicSlidingWindowLayer)
    return kinds <= {DynamicLayer}
