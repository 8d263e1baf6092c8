"""OpenVINO GenAI with continuous batching: the fast engine on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion
from fastdraft_hf.data.requests import Request


class OpenVINOEngine:
    """Keeps ``batch_size`` texts in flight; a new one starts as soon as one ends.

    Args:
        folder: the target's OpenVINO folder.
        stop_ids: token ids that end a text.
        batch_size: texts in flight.
        cache_gigabytes: size of the KV cache; a full one makes texts wait, nothing is lost.
    """

    name = "openvino"

    def __init__(
        self, folder: Path, stop_ids: set[int], batch_size: int = 64, cache_gigabytes: int = 1
    ) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = cache_gigabytes
        scheduler.max_num_seqs = batch_size
        scheduler.max_num_batched_tokens = 256
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU")
        self._stop_ids = stop_ids
        self._batch_size = batch_size

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        import numpy
        import openvino
        from openvino_genai import GenerationFinishReason, GenerationStatus

        waiting = iter(requests)
        running: dict[int, tuple[Request, Any, list[int]]] = {}
        exhausted = False
        while True:
            while not exhausted and len(running) < self._batch_size:
                request = next(waiting, None)
                if request is None:
                    exhausted = True
                    break
                ids = openvino.Tensor(numpy.array([request.prompt_ids], dtype=numpy.int64))
                handle = self._pipeline.add_request(request.index, ids, self._config(request))
                running[request.index] = (request, handle, [])
            if not running:
                return
            self._pipeline.step()
            written = 0
            for index in list(running):
                request, handle, ids = running[index]
                reason = None
                while handle.can_read():
                    for output in handle.read().values():
                        ids.extend(output.generated_ids)
                        written += len(output.generated_ids)
                        reason = output.finish_reason
                status = handle.get_status()
                if status == GenerationStatus.RUNNING:
                    continue
                if status != GenerationStatus.FINISHED:
                    raise FastDraftError(
                        f"OpenVINO gave up on text {index} ({status.name}); a prompt of "
                        f"{len(request.prompt_ids)} tokens may not fit its KV cache"
                    )
                stopped = reason == GenerationFinishReason.STOP
                yield Completion(request, tuple(ids), "stop" if stopped else "length")
                del running[index]
            on_tokens(written)

    def _config(self, request: Request):  # type: ignore[no-untyped-def]
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request.max_new_tokens
        config.do_sample = request.temperature > 0
        if config.do_sample:
            config.temperature = request.temperature
            config.rng_seed = request.seed
        config.stop_token_ids = self._stop_ids
        return config
