"""OpenVINO GenAI with continuous batching: the fast engine on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion, Request, completed


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
