"""Engines through which the target generates: one small interface, several speeds.

`OpenVINOEngine` (OpenVINO GenAI with continuous batching) is fast on a CPU, `VLLMEngine` on a GPU;
`TransformersEngine` works wherever the target runs. A server is an engine too (`server`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from fastdraft_hf._errors import FastDraftError

EngineName = Literal["auto", "openvino", "transformers", "vllm"]


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to generate. ``prompt_ids`` are used exactly as they are.

    Attributes:
        index: number of the row in its set.
        temperature: 0 is greedy.
        top_p: nucleus to sample from; 1 is the whole distribution.
    """

    index: int
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int
    max_new_tokens: int
    source: str
    top_p: float = 1.0

    @property
    def prompt_hash(self) -> str:
        """A short digest of the prompt's ids, equal for rows of one prompt."""
        data = b"".join(i.to_bytes(4, "little") for i in self.prompt_ids)
        return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class Completion:
    """The completion of one request: token ids as generated, never tokenized from text."""

    request: Request
    ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """Generates completions and yields them in any order, one per request."""

    name: str

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        """Yield one completion per request.

        Args:
            requests: read lazily; it may end early.
            on_tokens: called with the number of new tokens as they appear. If it returns True, the
                time is up: yield the beginnings of unfinished completions, if any, and return.
        """
        ...


def completed(request: Request, ids: Sequence[int], stop_ids: Collection[int]) -> Completion:
    """Return the completion that ends at the first stop token or at the length limit."""
    ids = ids[: request.max_new_tokens]
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Completion(request, tuple(ids[: position + 1]), "stop")
    return Completion(request, tuple(ids), "length")


class OpenVINOEngine:
    """Keep ``batch_size`` completions in flight; a new one starts as soon as one ends.

    A seed belongs to its row: other rows in flight change a row only by rounding. In float32 rows
    are equal. With int8 weights, activations are quantized by what is computed together, so some
    sampled rows differ.

    Args:
        folder: the target's OpenVINO folder.
        properties: of the OpenVINO device, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.
    """

    name = "openvino"

    def __init__(
        self,
        folder: Path,
        stop_ids: set[int],
        batch_size: int = 64,
        properties: dict[str, Any] | None = None,
    ) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1  # gigabytes of KV cache; if it is full, completions wait
        scheduler.max_num_seqs = batch_size
        scheduler.max_num_batched_tokens = 256
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(folder), scheduler, "CPU", properties or {}
        )
        self._stop_ids = stop_ids
        self._batch_size = batch_size
        self._number = 0

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        import numpy
        import openvino
        from openvino_genai import GenerationStatus

        waiting = iter(requests)
        running: dict[int, tuple[Request, Any, list[int]]] = {}
        try:
            while True:
                for request in islice(waiting, self._batch_size - len(running)):
                    ids = openvino.Tensor(numpy.array([request.prompt_ids], dtype=numpy.int64))
                    # A number of its own: the pipeline keeps a sampler for every number.
                    self._number += 1
                    handle = self._pipeline.add_request(self._number, ids, self._config(request))
                    running[request.index] = (request, handle, [])
                if not running:
                    return
                self._pipeline.step()
                new = 0
                for index, (request, handle, found) in list(running.items()):
                    while handle.can_read():
                        for output in handle.read().values():
                            found.extend(output.generated_ids)
                            new += len(output.generated_ids)
                    status = handle.get_status()
                    if status == GenerationStatus.RUNNING:
                        continue
                    del running[index]
                    if status != GenerationStatus.FINISHED:
                        raise FastDraftError(
                            f"generate: OpenVINO stopped row {index} ({status.name}). Its prompt "
                            f"of {len(request.prompt_ids)} tokens may not fit the KV cache"
                        )
                    yield completed(request, found, self._stop_ids)
                if on_tokens(new):
                    for request, _, found in running.values():
                        if found:
                            yield completed(request, found, self._stop_ids)
                    return
        finally:
            for _, handle, _ in running.values():
                handle.cancel()
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()

    def _config(self, request: Request) -> Any:
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request.max_new_tokens
        config.do_sample = request.temperature > 0
        if config.do_sample:
            config.temperature = request.temperature
            config.top_p = request.top_p
            config.rng_seed = request.seed
        config.stop_token_ids = self._stop_ids
        return config


class VLLMEngine:
    """vLLM in this process: ``batch_size`` completions in flight, each with its row's seed.

    Needs the package vllm, which brings a torch of its own: install fastdraft_hf beside it. It
    takes most of a GPU's memory until the process that it starts has ended with this object.
    """

    name = "vllm"

    def __init__(self, folder: Path, stop_ids: set[int], batch_size: int = 64) -> None:
        import vllm

        self._vllm, self._stop_ids, self._batch_size = vllm, stop_ids, batch_size
        model = vllm.LLM(
            str(folder),
            max_num_seqs=batch_size,
            generation_config="vllm",  # not the target's own top_k and penalties
            disable_log_stats=True,
        )
        self._engine = model.llm_engine

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        waiting = iter(requests)
        running: dict[str, tuple[Request, list[int]]] = {}
        try:
            while True:
                for request in islice(waiting, self._batch_size - len(running)):
                    number = str(request.index)
                    prompt = {"prompt_token_ids": list(request.prompt_ids)}
                    self._engine.add_request(number, prompt, self._params(request))
                    running[number] = (request, [])
                if not running:
                    return
                new = 0
                for output in self._engine.step():
                    request, found = running[output.request_id]
                    found += output.outputs[0].token_ids
                    new += len(output.outputs[0].token_ids)
                    if output.finished:
                        del running[output.request_id]
                        yield completed(request, found, self._stop_ids)
                if on_tokens(new):
                    for request, found in running.values():
                        if found:
                            yield completed(request, found, self._stop_ids)
                    return
        finally:
            self._engine.abort_request(list(running))

    def _params(self, request: Request) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop_token_ids=sorted(self._stop_ids),
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )


class RowSampler:
    """A logits processor that samples every row by the row's own seed.

    ``generate`` samples a whole batch from one random stream, so a row would depend on its
    neighbors. This processor leaves one token possible in each sampled row and is used with
    ``do_sample=False``. Greedy rows stay as they are. The token is the one at which the cumulative
    probability, most probable first, passes the row's next random number.

    Args:
        requests: the rows of the batch, in order.
        prompt_length: width of the padded prompts.
    """

    def __init__(self, requests: Sequence[Request], prompt_length: int) -> None:
        self._rows = [i for i, r in enumerate(requests) if r.temperature > 0]
        sampled = [requests[i] for i in self._rows]
        self._start = prompt_length
        longest = max((r.max_new_tokens for r in sampled), default=0)
        self._draws = torch.zeros(len(sampled), longest, dtype=torch.float64)
        for row, request in enumerate(sampled):
            source = torch.Generator().manual_seed(request.seed)
            draws = torch.rand(request.max_new_tokens, dtype=torch.float64, generator=source)
            self._draws[row, : request.max_new_tokens] = draws
        self._temperature = torch.tensor([[r.temperature] for r in sampled])
        self._top_p = torch.tensor([[r.top_p] for r in sampled], dtype=torch.float64)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] with one finite entry in each sampled row."""
        step = input_ids.shape[1] - self._start
        if not scores.amax(-1).isfinite().all():
            raise FastDraftError(
                "generate: the target's logits are not finite; look at its weights"
            )
        if not self._rows or step >= self._draws.shape[1]:  # only longer, greedy rows remain
            return scores
        device = scores.device
        chosen = scores[self._rows].float() / self._temperature.to(device)
        logits, tokens = chosen.sort(dim=-1, descending=True, stable=True)
        total = logits.double().softmax(-1).cumsum(-1)
        # The nucleus is the shortest prefix with at least top_p of the mass.
        inside = (total < self._top_p.to(device)).sum(-1, keepdim=True)
        mass = total.gather(1, inside.clamp(max=total.shape[1] - 1))
        draws = self._draws[:, step, None].to(device) * mass
        position = (total <= draws).sum(-1, keepdim=True).clamp(max=total.shape[1] - 1)
        token = tokens.gather(1, position)
        kept = scores[self._rows].gather(1, token)
        forced = scores.new_full((len(self._rows), scores.shape[1]), float("-inf"))
        scores = scores.clone()
        scores[self._rows] = forced.scatter_(1, token, kept)
        return scores


class TransformersEngine:
    """Generate in batches that are padded on the left and sorted by length within a window.

    A seed belongs to its row, so a row is the same in any batch up to rounding. The target runs in
    bfloat16 on a GPU, in float32 on a CPU.
    """

    name = "transformers"

    def __init__(
        self, folder: Path, stop_ids: set[int], batch_size: int = 64, device: str = "cpu"
    ) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False
        )
        self._model = model.to(device).eval()
        # The rest of the target's generation config (top_k, a repetition penalty) would change the
        # distribution that the draft learns.
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        self._model.generation_config = GenerationConfig(
            **{name: getattr(self._model.generation_config, name) for name in names}
        )
        self._device, self._stop_ids, self._batch_size = device, stop_ids, batch_size

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        waiting = iter(requests)
        while window := list(islice(waiting, self._batch_size * 8)):
            window.sort(key=lambda request: len(request.prompt_ids))
            for start in range(0, len(window), self._batch_size):
                watch = _Watch(window[start : start + self._batch_size], self._stop_ids, on_tokens)
                yield from self._batch(watch)
                if watch.over:
                    return

    def _batch(self, watch: _Watch) -> list[Completion]:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        batch, width = watch.batch, watch.width
        pad = min(self._stop_ids)
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            start = width - len(request.prompt_ids)
            ids[row, start:] = torch.tensor(request.prompt_ids)
            mask[row, start:] = 1
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max(request.max_new_tokens for request in batch),
                eos_token_id=sorted(self._stop_ids),
                pad_token_id=pad,
                do_sample=False,
                logits_processor=LogitsProcessorList([RowSampler(batch, width)]),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        rows = output[:, width:].tolist()
        return [
            completed(request, row, self._stop_ids)
            for request, row in zip(batch, rows, strict=True)
        ]


class _Watch:
    """A stopping criterion that counts tokens and ends a batch when the time is up."""

    def __init__(
        self, batch: list[Request], stop_ids: set[int], on_tokens: Callable[[int], bool | None]
    ) -> None:
        self.batch, self.over, self._on_tokens = batch, False, on_tokens
        self.width = max(len(request.prompt_ids) for request in batch)
        self._limits = torch.tensor([request.max_new_tokens for request in batch])
        self._stops = torch.tensor(sorted(stop_ids))
        self._running = torch.ones(len(batch), dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows [B] are done."""
        new = int(self._running.sum())
        self._running &= ~torch.isin(input_ids[:, -1].cpu(), self._stops)
        self._running &= input_ids.shape[1] - self.width < self._limits
        self.over = bool(self._on_tokens(new))
        return (~self._running | self.over).to(input_ids.device)
