"""`assisted_decoding`: our own loop for ``generate(assistant_model=…, custom_generate=…)``.

Stock assisted generation calls ``draft.generate()`` every round, whose set-up costs as much as a
tiny draft's passes. Here both caches live through the call, and a round is passes of the two models
only (`fastdraft_hf.decode.loop`). The output is the target's own: token for token when greedy, in
distribution when sampling.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers import StoppingCriteriaList as Criteria
from transformers.generation import GenerateDecoderOnlyOutput

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.decode.cached import CachedModel, TorchModel, execution_device
from fastdraft_hf.decode.length import draft_length
from fastdraft_hf.decode.lookup import PromptLookup
from fastdraft_hf.decode.loop import Loop
from fastdraft_hf.decode.obstacles import is_openvino, obstacles
from fastdraft_hf.decode.openvino.paged import PagedModel, paged
from fastdraft_hf.decode.patches import CACHE_NAME, decode_alone, deliver_arguments
from fastdraft_hf.decode.records import listener
from fastdraft_hf.decode.scores import Scores
from fastdraft_hf.decode.settings import PROMPT_LOOKUP_MIN, TEMPERATURE_RATIO, Drafting
from fastdraft_hf.decode.text import Stops, Text

# transformers' own defaults for a draft whose generation config says nothing.
_DEFAULTS = (20, "constant", 0.4)


def assisted_decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Criteria,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    inputs_tensor: torch.Tensor | None = None,
    assistant_model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode with a draft; give it to ``generate`` as ``custom_generate``.

    Greedy and sampling with any logits processors, stopping criteria, stop strings, streamers,
    several end tokens and batches with padding on the left. γ, its schedule and the confidence
    threshold come from the draft's generation config, as in stock assisted generation, and so do
    two settings of ours: ``assistant_temperature_ratio``, by which the draft samples sharper than
    the target, and ``prompt_lookup_min``: where so many of the last tokens stood in the text
    before, what followed them is copied instead of drafted (0: never; not with the schedule
    ``cost``). Target and draft may each be a PyTorch causal LM or an ``OVModelForCausalLM``, of
    different types and on different devices. What the loop cannot do, transformers decodes with the
    target alone after one warning.

    A logits processor of a class that transformers does not define is called once per emitted
    token, in order, as without a draft. In a batch, processors that read the text are called row by
    row with ids [1, length], and the cache is returned for a single row only.

    Example:
        >>> target.generate(
        ...     **inputs, assistant_model=draft, custom_generate=fastdraft_hf.assisted_decoding
        ... )

    Args:
        model: the target.
        input_ids: [B, L] prompts, padded on the left.
        assistant_model: the draft.
        **model_kwargs: the target's inputs. Everything else is as `generate` prepares it.

    Returns:
        ids [B, L + new], rows that end early padded on the right; or a
        ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate``.

    Raises:
        FastDraftError: the vocabularies differ and no tokenizers were given.
    """
    if not input_ids.shape[0]:
        return input_ids
    # torch.compile returns a wrapper; its passes are not the ones that the loop runs.
    draft = getattr(assistant_model, "_orig_mod", assistant_model)
    prepared = dict(
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        synced_gpus=synced_gpus,
        **model_kwargs,
        **({} if streamer is None else {"streamer": streamer}),
    )
    reasons = list(obstacles(model, input_ids, draft, assistant_tokenizer, **prepared))
    if not reasons:
        reasons = [
            f"{type(one).__name__} cannot have its cache in pages"
            for one in (model, draft)
            if is_openvino(one) and paged(one) is None
        ]
    if reasons:
        warnings.warn(
            f"assisted_decoding: {'; '.join(reasons)}; transformers decodes with the target alone",
            stacklevel=2,
        )
        return decode_alone(model, input_ids, prepared)
    return _decode(model, draft, input_ids.to(execution_device(model)), **prepared)


def _decode(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Criteria,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    config = generation_config
    rows, length = input_ids.shape
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        mask = None if bool(mask.all()) else mask.to(input_ids.device)
    positions = model_kwargs.get("position_ids")
    if positions is None or positions.shape[-1] != length:
        ones = torch.ones_like(input_ids) if mask is None else mask
        positions = (ones.cumsum(-1) - 1).clamp(min=0)
    pad = config.pad_token_id
    pad = getattr(config, "_pad_token_tensor", None) if pad is None else pad
    text = Text(input_ids, mask, positions.to(input_ids.device).expand(rows, -1), int(pad or 0))
    keeps = config.return_dict_in_generate
    drafting = drafting_of(draft)
    if drafting.schedule == "cost":
        if drafting.mask_token is not None:
            raise FastDraftError(
                "num_assistant_tokens_schedule: cost decides token by token, and this draft makes "
                "a block in one pass (pard_token in its config); use constant"
            )
        drafting.by_cost = draft_length(model, draft, rows, bool(config.do_sample))
    copies = drafting.prompt_lookup_min
    loop = Loop(
        target=open_cached(model, model_kwargs.get(CACHE_NAME), mask),
        draft=open_cached(draft),
        text=text,
        scores=Scores(logits_processor, _vocabulary(model), rows),
        stops=Stops.read(stopping_criteria, config),
        drafting=drafting,
        sampling=bool(config.do_sample),
        lookup=PromptLookup(text, copies) if copies > 0 else None,
        streamer=streamer,
        report=listener.get(),
        kept_scores=[[] for _ in range(rows)] if keeps and config.output_scores else None,
        kept_logits=[[] for _ in range(rows)] if keeps and config.output_logits else None,
    )
    both_openvino = is_openvino(model) and is_openvino(draft)
    with one_torch_thread() if both_openvino else contextlib.nullcontext():
        loop.run()
    if drafting.schedule == "heuristic":
        draft.generation_config.num_assistant_tokens = drafting.num_assistant_tokens
    sequences = text.whole()
    if not keeps:
        return sequences
    cache = getattr(loop.target, "cache", None)
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=_by_step(loop.kept_scores),
        logits=_by_step(loop.kept_logits),
        **{CACHE_NAME: cache if rows == 1 else None},
    )


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep PyTorch to the calling thread while OpenVINO does the work.

    PyTorch's helper threads spin for milliseconds after each small operation and hold cores that
    OpenVINO's wait for: a pass took 11.2 ms with two threads of PyTorch and 9.3 with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def drafting_of(draft: PreTrainedModel) -> Drafting:
    """Read how to draft from the draft's generation config."""
    config = draft.generation_config
    number = config.num_assistant_tokens
    schedule = config.num_assistant_tokens_schedule
    threshold = config.assistant_confidence_threshold
    limit = getattr(draft.config.get_text_config(), "max_position_embeddings", None)
    return Drafting(
        _DEFAULTS[0] if number is None else int(number),
        _DEFAULTS[1] if schedule is None else str(schedule),
        _DEFAULTS[2] if threshold is None else float(threshold),
        limit,
        getattr(config, TEMPERATURE_RATIO, 1.0),
        mask_token=getattr(draft.config.get_text_config(), "pard_token", None),
        prompt_lookup_min=int(getattr(config, PROMPT_LOOKUP_MIN, None) or 0),
    )


def open_cached(
    model: PreTrainedModel, cache: Any = None, prompt_mask: torch.Tensor | None = None
) -> CachedModel:
    """Return a model with its cache, empty or given; the other arguments as `TorchModel`'s.

    Raises:
        FastDraftError: an OpenVINO model cannot have its cache in pages.
    """
    if is_openvino(model):
        pages = paged(model)
        if pages is None:
            raise FastDraftError(f"{type(model).__name__} cannot have its cache in pages")
        return PagedModel(pages)
    if cache is None:
        # Newer releases can take tokens back from sliding layers; older ones need full layers.
        recording = hasattr(DynamicCache, "activate_past_recording")
        cache = DynamicCache(config=model.config) if recording else DynamicCache()
    return TorchModel(model, cache, prompt_mask, head_token_ids(model))


def head_token_ids(model: Any) -> torch.Tensor | None:
    """Return the tokens of a reduced vocabulary: ``head_token_ids`` of the model or its config."""
    ids = getattr(model, "head_token_ids", None)
    if ids is None:
        ids = getattr(model.config, "head_token_ids", None)
    return None if ids is None else torch.as_tensor(ids, dtype=torch.long, device=model.device)


def _vocabulary(model: PreTrainedModel) -> int:
    """Return the width of the model's logits."""
    head = None if is_openvino(model) else model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not None:
        return int(head.weight.shape[0])
    return int(model.config.get_text_config().vocab_size)


def _by_step(rows: list[list[torch.Tensor]] | None) -> tuple[torch.Tensor, ...] | None:
    """Turn one [e, V] per round and row into one [B, V] per step; ended rows get zeros."""
    if rows is None:
        return None
    padded = torch.nn.utils.rnn.pad_sequence([torch.cat(row) for row in rows], batch_first=True)
    return tuple(padded.unbind(1))


deliver_arguments(assisted_decoding)
