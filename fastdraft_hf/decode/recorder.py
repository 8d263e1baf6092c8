"""Record what ``generate`` drafts and accepts, through stock decoding or our loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.decode.assisted import DraftPath, report_rounds
from fastdraft_hf.decode.records import DecodingRecord, DecodingRecords

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The active recorders: stock assisted generation calls the draft's ``generate`` in every round, and
# a draft may be the target itself.
_running: ContextVar[tuple[int, ...]] = ContextVar("running", default=())


@contextlib.contextmanager
def record_decoding(target: PreTrainedModel, *, task: str = "") -> Iterator[DecodingRecords]:
    """Collect a record of every answer of ``target.generate`` in the block.

    It covers stock assisted generation, `fastdraft_hf.assisted_decoding` with batches, and the
    target alone, for PyTorch models and ``OVModelForCausalLM``, one call at a time. For OpenVINO
    GenAI, whose pipelines are not Python objects, see `record_result`.

    A record's ``key`` is its number in the block. The seconds of a batch are divided evenly among
    its rows, so that sums are wall clock. Alone, every token counts as one pass of the target,
    which does not hold for beam search.

    Example:
        >>> with fastdraft_hf.record_decoding(target) as records:
        ...     target.generate(**inputs, assistant_model=draft)
        >>> metric = evaluate.load(fastdraft_hf.metric_path("acceptance_rate"))
        >>> metric.compute(**records.columns())

    Args:
        target: the model whose ``generate`` is called; for a PEFT model, its base is watched.
        task: written into the records.

    Raises:
        FastDraftError: ``target`` does not have transformers' ``generate``.
    """
    model: Any = target.get_base_model() if hasattr(target, "get_base_model") else target
    if not hasattr(model, "_get_candidate_generator"):
        raise FastDraftError(
            f"record_decoding needs a model with transformers' generate, not "
            f"{type(target).__name__}; for OpenVINO GenAI see fastdraft_hf.record_result"
        )
    records = DecodingRecords()
    generate, nested = model.generate, "generate" in vars(model)

    def recording(*args: Any, **kwargs: Any) -> Any:
        if id(records) in _running.get():
            return generate(*args, **kwargs)
        named = dict(zip(("inputs", "generation_config"), args, strict=False))
        call = _Call(model, {**named, **kwargs})
        token = _running.set((*_running.get(), id(records)))
        try:
            with report_rounds(model, call.report):
                start = time.perf_counter()
                output = generate(*args, **kwargs)
                seconds = time.perf_counter() - start
        finally:
            _running.reset(token)
        for record in call.records(output, seconds):
            record.task, record.key = task, str(len(records))
            records.append(record)
        return output

    model.generate = recording
    try:
        yield records
    finally:
        if nested:
            model.generate = generate
        else:
            del model.generate


class _Call:
    """One call of ``generate``: its arguments, and the rounds of every row."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.model, self.given = model, given
        self.path: DraftPath = "transformers"
        self.rounds: dict[int, list[tuple[int, int]]] = {}
        self.prompt = self._prompt_length()
        self.gamma = self._drafted_a_round()

    def report(self, path: DraftPath, row: int, drafted: int, accepted: int) -> None:
        self.path = path
        self.rounds.setdefault(row, []).append((drafted, accepted))

    def records(self, output: Any, seconds: float) -> Iterator[DecodingRecord]:
        from fastdraft_hf.decode.obstacles import is_openvino

        sequences = getattr(output, "sequences", output)[:, self.prompt :].tolist()
        openvino = is_openvino(self.model) or is_openvino(self.given.get("assistant_model"))
        sampling = bool(self._setting("do_sample"))
        temperature = self._setting("temperature")
        for row, written in enumerate(sequences):
            rounds = self.rounds.get(row, [])
            # Every round emits what it accepted and one token of the target's own.
            emitted = sum(accepted + 1 for _, accepted in rounds)
            tokens = written[:emitted] if self.rounds else self._until_the_end(written)
            longest = max((drafted for drafted, _ in rounds), default=0)
            yield DecodingRecord(
                path="ours-openvino" if openvino else self.path,
                task="",
                key="",
                temperature=(1.0 if temperature is None else temperature) if sampling else 0.0,
                num_assistant_tokens=(self.gamma or longest) if self.rounds else 0,
                tokens=tokens,
                seconds=seconds / len(sequences),
                target_passes=len(rounds) if self.rounds else len(tokens),
                drafted=sum(drafted for drafted, _ in rounds),
                accepted=sum(accepted for _, accepted in rounds),
                rounds=rounds,
            )

    def _prompt_length(self) -> int:
        """Return how many leading ids of the output belong to the prompt."""
        if self.model.config.is_encoder_decoder:
            ids = self.given.get("decoder_input_ids")
            return 1 if ids is None else int(ids.shape[-1])
        ids = self.given.get("inputs")
        ids = self.given.get("input_ids") if ids is None else ids
        if ids is not None:
            return int(ids.shape[-1])
        # Without a prompt there is one start token; with embeddings there are no ids.
        return 0 if self.given.get("inputs_embeds") is not None else 1

    def _drafted_a_round(self) -> int:
        """Return γ before the call; the schedule ``heuristic`` changes it."""
        draft = self.given.get("assistant_model")
        if draft is None:
            return 0
        from fastdraft_hf.decode.speculative import drafting_of

        return drafting_of(draft).num_assistant_tokens

    def _setting(self, name: str) -> Any:
        configs = (self.given.get("generation_config"), self.model.generation_config)
        values = (self.given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def _until_the_end(self, written: list[int]) -> list[int]:
        """Return a row of a batch without its padding."""
        found = self._setting("eos_token_id")
        ends = set(found) if isinstance(found, Iterable) else {found}
        place = next((n for n, token in enumerate(written) if token in ends), len(written))
        tokens = written[: place + 1]
        pad = self._setting("pad_token_id")
        while len(tokens) > 1 and tokens[-1] == pad and pad not in ends:
            tokens.pop()
        return tokens
