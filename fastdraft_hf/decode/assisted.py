"""Decode through ``generate``, alone and with a draft, and record every round and answer.

With a draft there are two paths: stock assisted generation (``transformers``) and our own loop
(``ours``). Both report their rounds, and their greedy records are equal unless the loop copies.
Stock prompt lookup (``prompt-lookup``) drafts without a model, by copying from the text.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal
from unittest.mock import patch

import torch
from transformers import PreTrainedModel, set_seed

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.decode.obstacles import is_openvino
from fastdraft_hf.decode.patches import watch_stock_rounds
from fastdraft_hf.decode.records import DecodingRecord, DecodingRecords, listener
from fastdraft_hf.decode.settings import set_draft_length
from fastdraft_hf.decode.speculative import assisted_decoding, drafting_of

DraftPath = Literal["transformers", "ours", "prompt-lookup"]


# Called with (path, row, drafted, accepted) of a round.
Report = Callable[[DraftPath, int, int, int], None]


@contextlib.contextmanager
def report_rounds(target: PreTrainedModel, report: Report) -> Iterator[None]:
    """Call ``report`` for every round that ``target.generate`` runs in the block."""
    before = listener.get()

    def heard(row: int, drafted: int, accepted: int) -> None:
        report("ours", row, drafted, accepted)
        if before is not None:
            before(row, drafted, accepted)

    token = listener.set(heard)
    try:
        with watch_stock_rounds(target, lambda *one: report("transformers", 0, *one)):
            yield
    finally:
        listener.reset(token)


@contextlib.contextmanager
def record_rounds(target: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """Collect (drafted, accepted) of every round of ``target.generate`` in the block.

    It covers stock assisted generation and `fastdraft_hf.assisted_decoding`; for a batch, the
    rounds of all rows. `fastdraft_hf.record_decoding` keeps answers and rows apart.
    """
    rounds: list[tuple[int, int]] = []
    with report_rounds(target, lambda path, row, *one: rounds.append(one)):
        yield rounds


class _FirstToken:
    """A streamer that notes the time of the first new token; `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        if len(self.times) < 2:
            self.times.append(time.perf_counter())

    def end(self) -> None: ...


def _synchronize(*models: Any) -> None:
    """Wait for the models' GPUs: kernels run on after the call that started them has returned."""
    for device in {model.device for model in models if model is not None}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def decode(
    target: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    task: str = "",
    key: str = "",
    temperature: float = 0.0,
    seed: int = 0,
    draft: PreTrainedModel | None = None,
    num_assistant_tokens: int = 0,
    prompt_lookup_min: int = 0,
    path: DraftPath = "transformers",
) -> DecodingRecord:
    """Decode one prompt with ``target.generate``, assisted when a draft is given.

    Args:
        max_new_tokens: longest answer, in tokens.
        task, key: written into the record.
        temperature: 0 for greedy, else plain multinomial sampling at this temperature.
        seed: of the sampling.
        draft: the draft; ``None`` decodes with the target alone.
        num_assistant_tokens: γ. 0 with a draft and path ``ours`` runs our loop without drafting.
        prompt_lookup_min: of `fastdraft_hf.decode.settings`; 0 measures the draft alone.
        path: ``ours`` decodes with the draft through `fastdraft_hf.assisted_decoding`;
            ``prompt-lookup`` copies γ tokens from the text and takes no draft.
    """
    inputs = torch.tensor([list(prompt_ids)], device=target.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        set_seed(seed)
    if draft is not None:
        set_draft_length(draft.generation_config, num_assistant_tokens, prompt_lookup_min)
        sampling["assistant_model"] = draft
        if path == "ours":
            sampling["custom_generate"] = assisted_decoding
    elif path == "prompt-lookup":
        sampling["prompt_lookup_num_tokens"] = num_assistant_tokens
    drafting = draft is not None or path == "prompt-lookup"
    first = _FirstToken()
    with torch.inference_mode(), record_decoding(target, task=task) as records:
        _synchronize(target, draft)
        start = time.perf_counter()
        target.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            streamer=first,
            **sampling,
        )
        _synchronize(target, draft)
        seconds = time.perf_counter() - start
    record = records[0]
    beyond = len(record.tokens) - max_new_tokens
    if beyond > 0:
        # Stock prompt lookup copies past the longest answer; the surplus is not counted.
        record.tokens = record.tokens[:max_new_tokens]
        drafted, accepted = record.rounds[-1]
        record.rounds[-1] = drafted, max(0, accepted - beyond)
        record.accepted -= accepted - record.rounds[-1][1]
    record.key, record.seconds = key, seconds
    record.path = path if drafting else "transformers"
    record.num_assistant_tokens = num_assistant_tokens if drafting else 0
    record.first_token_seconds = first.times[1] - start if len(first.times) > 1 else None
    return record


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
    generate = model.generate
    running = False

    def recording(*args: Any, **kwargs: Any) -> Any:
        nonlocal running
        # Stock generation calls the draft's `generate` every round; it may be the target itself.
        if running:
            return generate(*args, **kwargs)
        named = dict(zip(("inputs", "generation_config"), args, strict=False))
        call = _Call(model, {**named, **kwargs})
        running = True
        try:
            with report_rounds(model, call.report):
                start = time.perf_counter()
                output = generate(*args, **kwargs)
                seconds = time.perf_counter() - start
        finally:
            running = False
        for record in call.records(output, seconds):
            record.task, record.key = task, str(len(records))
            records.append(record)
        return output

    with patch.object(model, "generate", recording):
        yield records


class _Call:
    """One call of ``generate``: its arguments, and the rounds of every row."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.model, self.given = model, given
        self.path: DraftPath = "transformers"
        self.rounds: dict[int, list[tuple[int, int]]] = {}
        # Read before the call: the schedule ``heuristic`` changes γ.
        draft = given.get("assistant_model")
        self.gamma = 0 if draft is None else drafting_of(draft).num_assistant_tokens

    def report(self, path: DraftPath, row: int, drafted: int, accepted: int) -> None:
        self.path = path
        self.rounds.setdefault(row, []).append((drafted, accepted))

    def records(self, output: Any, seconds: float) -> Iterator[DecodingRecord]:
        sequences = getattr(output, "sequences", output)[:, self._prompt_length() :].tolist()
        openvino = is_openvino(self.model) or is_openvino(self.given.get("assistant_model"))
        sampling = bool(self._setting("do_sample"))
        temperature = self._setting("temperature")
        for row, tokens in enumerate(sequences):
            rounds = self.rounds.get(row, [])
            if self.rounds:
                # Every round emits what it accepted and one token of the target's own.
                tokens = tokens[: sum(accepted + 1 for _, accepted in rounds)]
            elif len(sequences) > 1:
                tokens = self._without_padding(tokens)
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
        ids = self.given.get("inputs")
        ids = self.given.get("input_ids") if ids is None else ids
        if ids is not None:
            return int(ids.shape[-1])
        # Without a prompt there is one start token; with embeddings there are no ids.
        return 0 if self.given.get("inputs_embeds") is not None else 1

    def _setting(self, name: str) -> Any:
        configs = (self.given.get("generation_config"), self.model.generation_config)
        values = (self.given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def _without_padding(self, tokens: list[int]) -> list[int]:
        """Return a row of a batch up to its end token, or without the padding after a stop."""
        found = self._setting("eos_token_id")
        ends = set(found) if isinstance(found, Iterable) else {found}
        end = next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))
        tokens, pad = tokens[:end], self._setting("pad_token_id")
        while len(tokens) > 1 and tokens[-1] == pad and pad not in ends:
            tokens.pop()
        return tokens
