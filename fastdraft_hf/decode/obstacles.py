"""What our loop cannot do: each obstacle with its reason."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.decode.cached import execution_device
from fastdraft_hf.decode.patches import CACHE_NAME, is_stateful
from fastdraft_hf.decode.scores import BY_ROW_NUMBER, keeps_state
from fastdraft_hf.decode.text import ROW_BY_ROW

# What `generate` passes to any decoding method. Anything else is for a model of another kind.
_KNOWN = {
    "attention_mask",
    "position_ids",
    CACHE_NAME,
    "use_cache",
    "logits_to_keep",
    "cache_position",
}
# Config keys that limit how far attention reaches, counted in slots of the cache.
_WINDOW = re.compile(r"(window|chunk)(_size)?$")


def is_openvino(model: Any) -> bool:
    """Return whether a model is optimum-intel's, without importing it."""
    return any(c.__module__.startswith("optimum.intel.openvino") for c in type(model).__mro__)


def obstacles(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    draft: PreTrainedModel | None,
    draft_tokenizer: Any,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Iterator[str]:
    """Yield every reason why the loop cannot decode this call; arguments as `assisted_decoding`'s.

    Raises:
        FastDraftError: the vocabularies differ and no tokenizers were given.
    """
    rows, length = input_ids.shape
    config = generation_config
    if draft is None:
        yield "no assistant_model was given"
        return
    mode = config.get_generation_mode(None)
    if mode not in ("greedy_search", "sample"):
        yield f"{mode.replace('_', ' ')} takes no draft"
    if synced_gpus:
        yield "models spread over processes are not supported"
    returns = config.return_dict_in_generate
    if returns and (config.output_attentions or config.output_hidden_states):
        yield "attentions and hidden states are not kept"
    if getattr(config, "assistant_ensemble_weight", None) is not None:
        yield "assistant_ensemble_weight is not supported"
    further = sorted(k for k, v in model_kwargs.items() if v is not None and k not in _KNOWN)
    if further or not length:
        yield f"inputs {', '.join(further) or 'without ids'} are not supported"
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        yield "positions of several dimensions are not supported"
    if rows > 1 and streamer is not None:
        yield "a streamer cannot tell apart rows that grow at different rates"
    if model.config.is_encoder_decoder or draft.config.is_encoder_decoder:
        yield "encoder-decoder models are not supported"
    elif draft_tokenizer is not None:
        yield "target and draft have different tokenizers"
    else:
        ours, theirs = (m.config.get_text_config().vocab_size for m in (model, draft))
        if ours != theirs:
            raise FastDraftError(
                f"the draft's vocabulary has {theirs} tokens and the target's {ours}; a draft must "
                "use the target's own tokenizer"
            )
        yield from _of_the_models(model, draft, rows, length, int(config.max_length), model_kwargs)
    by_number = sorted({type(p).__name__ for p in logits_processor} & BY_ROW_NUMBER)
    stateful = sorted({type(p).__name__ for p in logits_processor if keeps_state(p)})
    if rows > 1 and by_number:
        yield f"{', '.join(by_number)} needs whole batches"
    if rows > 1 and stateful:
        yield f"{', '.join(stateful)} may keep a state over a whole batch"
    others = sorted({type(c).__name__ for c in stopping_criteria if type(c) not in ROW_BY_ROW})
    if others and (rows > 1 or (returns and config.output_scores)):
        yield f"{', '.join(others)} may look at a whole batch or at scores"


def _of_the_models(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    rows: int,
    length: int,
    last: int,
    model_kwargs: dict[str, Any],
) -> Iterator[str]:
    if draft is model and is_openvino(model):
        yield "an OpenVINO model cannot draft for itself: it has one cache"
    for one in (model, draft):
        if is_openvino(one):
            continue
        if is_stateful(one) or cannot_roll_back(one.config):
            yield f"{type(one).__name__} has layers with a state that cannot be taken back"
        elif not _is_plain(one, length, last):
            yield f"{type(one).__name__} prepares inputs of its own"
    name = type(model).__name__
    if is_openvino(model):
        if "position_ids" not in model.input_names or _has_window(model, last):
            yield f"{name} measures distances in slots of the cache"
        return
    cache = model_kwargs.get(CACHE_NAME)
    if not model_kwargs.get("use_cache", True) or not _can_roll_back(cache, rows):
        yield "a dynamic cache is needed, from which tokens can be taken back"
    elif cache.get_seq_length() >= length:
        yield "the cache holds the whole prompt"
    elif rows > 1 and (_has_window(model, last) or not _hides_slots(model)):
        yield f"{name} measures distances in slots of the cache"


def _is_plain(model: PreTrainedModel, first: int, last: int) -> bool:
    """Return whether a model reads ids, mask, positions and a key-value cache, and nothing else."""
    config = model.config.get_text_config()
    if CACHE_NAME not in inspect.signature(model.forward).parameters:
        return False
    own = getattr(type(model), "prepare_inputs_for_generation", None)
    if own is GenerationMixin.prepare_inputs_for_generation:
        return True
    # Phi-3 recomputes its cache where the text outgrows its short rotary factors, and only there.
    limit = getattr(config, "original_max_position_embeddings", None) or last
    return config.model_type in ("phi3", "phimoe") and not first <= limit < last


def cannot_roll_back(config: PretrainedConfig) -> bool:
    """Return whether some layers keep a state instead of the tokens' keys and values.

    Such are linear attention, state spaces, convolutions, and the index of sparse attention.
    """
    config = config.get_text_config()
    names = ("layer_types", "block_types", "layers_block_type")
    kinds = [kind for name in names for kind in getattr(config, name, None) or []]
    plain = all("attention" in kind and "linear" not in kind for kind in kinds)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return not plain or hasattr(config, "index_topk") or getattr(cls, "_is_stateful", False)


def _has_window(model: PreTrainedModel, last: int) -> bool:
    """Return whether the target's attention is shorter than a cache with hidden slots."""
    config = model.config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return False
    # Slots outnumber tokens by what is hidden until a compaction.
    slots = 1.5 * last + 256
    return any(
        0 < value <= slots
        for name, value in config.to_dict().items()
        if _WINDOW.search(name) and isinstance(value, int) and not isinstance(value, bool)
    )


_hiding: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _hides_slots(model: PreTrainedModel) -> bool:
    """Return whether the model reads a row alike wherever its hidden slots lie; try it once."""
    if model not in _hiding:
        _hiding[model] = "position_ids" in inspect.signature(model.forward).parameters
        if _hiding[model]:
            device = execution_device(model)
            ids = torch.tensor([[1, 2, 0, 3, 4], [0, 1, 2, 3, 4]], device=device)
            mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], device=device)
            positions = torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 2, 3]], device=device)
            with torch.inference_mode():
                given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
                logits = model(input_ids=ids, **given).logits[:, -1].float()
            # Far above what rounding to bfloat16 does, far below what another position does.
            near = 0.02 * max(1.0, float(logits.abs().max()))
            _hiding[model] = bool((logits[0] - logits[1]).abs().max() <= near)
    return _hiding[model]


def _can_roll_back(cache: Any, rows: int) -> TypeGuard[DynamicCache]:
    if not isinstance(cache, DynamicCache):
        return False
    kinds = {type(layer) for layer in cache.layers}
    if rows == 1 and hasattr(cache, "activate_past_recording"):
        kinds.discard(DynamicSlidingWindowLayer)
    return kinds <= {DynamicLayer}
