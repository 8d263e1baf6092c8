"""Decode through OpenVINO GenAI's `LLMPipeline`, alone and with a draft."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.decode.settings import read_draft_tokens
from fastdraft_hf.export.openvino import require_openvino

# γ of a draft without a measured one: the paper's.
_UNMEASURED = 3
# Longest run of tokens that prompt lookup searches for: transformers' default.
_LOOKUP_NGRAM = 2


def openvino_pipeline(
    target_dir: str | Path, draft_dir: str | Path, device: str = "CPU", **properties: Any
) -> Any:
    """Return OpenVINO GenAI's ``LLMPipeline`` of a target with its draft.

    γ comes from ``num_assistant_tokens`` of the draft's generation config (3 when it has none) and
    goes into the pipeline's own generation config, so that ``pipeline.generate(prompt,
    max_new_tokens=64)`` drafts as measured. A new ``GenerationConfig`` lacks it; change a copy of
    ``pipeline.get_generation_config()`` instead.

    Greedy text is the target's own. Sampled text is not distributed as the target's (GenAI
    2026.4.1.0; `fastdraft audit --engine openvino`): to sample, use `assisted_decoding`.

    Args:
        target_dir: the target's OpenVINO folder, written by `fastdraft export` or optimum-intel.
        draft_dir: the draft's.
        device: the OpenVINO device of both models, such as ``CPU`` or ``GPU``.
        **properties: further properties of the pipeline, such as ``scheduler_config``.

    Raises:
        FastDraftError: OpenVINO is missing, or a folder has no OpenVINO model.
    """
    require_openvino()
    for folder in (target_dir, draft_dir):
        if not (Path(folder) / "openvino_model.xml").is_file():
            raise FastDraftError(
                f"{folder} has no openvino_model.xml; export the model first (fastdraft export)"
            )
    import openvino_genai

    draft = openvino_genai.draft_model(str(draft_dir), device)
    pipeline = openvino_genai.LLMPipeline(str(target_dir), device, draft_model=draft, **properties)
    # With a draft the pipeline starts from an empty config instead of the target's own.
    own = Path(target_dir) / "generation_config.json"
    config = openvino_genai.GenerationConfig(*([str(own)] if own.is_file() else []))
    if config.eos_token_id < 0:
        config.set_eos_token_id(pipeline.get_tokenizer().get_eos_token_id())
    config.num_assistant_tokens = read_draft_tokens(Path(draft_dir)) or _UNMEASURED
    pipeline.set_generation_config(config)
    return pipeline


class OpenVINODecoder:
    """An `LLMPipeline` that returns records.

    Args:
        target, draft: OpenVINO folders; without a draft the target decodes alone.
        prompt_lookup: draft by copying from the text, as transformers' prompt lookup does.
        properties: of both models, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.

    All kinds run on the same scheduler (continuous batching), so that a ratio between them
    compares drafting and nothing else.
    """

    def __init__(
        self,
        target: Path,
        draft: Path | None = None,
        prompt_lookup: bool = False,
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        given = dict(properties or {})
        options: dict[str, Any] = {"scheduler_config": scheduler, **given}
        if draft is not None:
            options["draft_model"] = openvino_genai.draft_model(str(draft), "CPU", **given)
        if prompt_lookup:
            options["prompt_lookup"] = True
        self._pipeline = openvino_genai.LLMPipeline(str(target), "CPU", **options)
        self._drafts = draft is not None
        self._lookup = prompt_lookup

    def decode(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: set[int],
        task: str = "",
        key: str = "",
        num_assistant_tokens: int = 0,
    ) -> DecodingRecord:
        """Decode one prompt greedily; arguments as `fastdraft_hf.decode.assisted.decode`."""
        import numpy
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.stop_token_ids = stop_ids
        config.do_sample = False
        if self._drafts or self._lookup:
            config.num_assistant_tokens = num_assistant_tokens
        if self._lookup:
            config.max_ngram_size = _LOOKUP_NGRAM
        inputs = openvino.Tensor(numpy.array([prompt_ids], dtype=numpy.int64))
        start = time.perf_counter()
        result = self._pipeline.generate(inputs, config)
        seconds = time.perf_counter() - start
        record = record_result(result, num_assistant_tokens, task=task, key=key)
        record.seconds = seconds
        record.first_token_seconds = result.perf_metrics.get_ttft().mean / 1e3
        if self._lookup:
            # GenAI reports the number of passes, not the number of drafted tokens.
            passes = len(result.perf_metrics.raw_metrics.m_batch_sizes)
            record.path = "openvino-prompt-lookup"
            record.num_assistant_tokens = num_assistant_tokens
            record.drafted, record.accepted = 0, max(0, record.new_tokens - passes)
            record.target_passes = max(1, record.new_tokens - record.accepted)
        return record


def record_result(
    result: Any,
    num_assistant_tokens: int,
    *,
    temperature: float = 0.0,
    task: str = "",
    key: str = "",
) -> DecodingRecord:
    """Return the record of an OpenVINO GenAI pipeline's result.

    ``LLMPipeline.generate`` returns such a result for a list of prompts or for token ids; for a
    plain string it returns the text alone. GenAI reports the totals of a call and not its rounds,
    so a call with several prompts gives one record of them all.

    Example:
        >>> result = pipeline.generate(["def add(a, b):"], max_new_tokens=64)
        >>> records = DecodingRecords([fastdraft_hf.record_result(result, 3)])

    Args:
        result: ``DecodedResults`` (the number of tokens is known, their ids are not) or
            ``EncodedResults``.
        num_assistant_tokens: γ of the call; ignored for a pipeline without a draft.
        temperature: written into the record; 0 is greedy.
        task: the prompt's task set, written into the record.
        key: the prompt's key in it, likewise.

    Raises:
        FastDraftError: ``result`` is not such a result.
    """
    metrics = getattr(result, "perf_metrics", None)
    if metrics is None:
        raise FastDraftError(
            f"record_result needs what LLMPipeline.generate returns for a list of prompts or for "
            f"token ids, not {type(result).__name__}"
        )
    ids = list(getattr(result, "tokens", []))
    counted = sum(map(len, ids)) or metrics.get_num_generated_tokens()
    tokens = list(ids[0]) if len(ids) == 1 else []
    drafting = result.extended_perf_metrics
    drafted = accepted = 0
    if drafting is not None:
        drafted, accepted = drafting.get_num_draft_tokens(), drafting.get_num_accepted_tokens()
    return DecodingRecord(
        path="openvino",
        task=task,
        key=key,
        temperature=temperature,
        num_assistant_tokens=num_assistant_tokens if drafting is not None else 0,
        tokens=tokens,
        seconds=metrics.get_generate_duration().mean / 1000,
        # Every pass of the target gives one token of its own beside the accepted ones.
        target_passes=max(1, counted - accepted),
        drafted=drafted,
        accepted=accepted,
        counted_tokens=0 if tokens else counted,
    )
