"""OpenVINO GenAI with continuous batching: the fast engine on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion, Drafting, completed
from fastdraft_hf.data.requests import Request


class OpenVINOEngine:
    """Keeps ``batch_size`` texts in flight; a new one starts as soon as one ends.

    A seed belongs to its row: what else is in flight moves a row only by rounding. In float32 that
    is nothing; int8 weights quantise activations by what is computed together, and then some
    sampled rows part ways.

    Args:
        folder: the target's OpenVINO folder.
        stop_ids: token ids that end a text.
        batch_size: texts in flight.
        cache_gigabytes: size of the KV cache; a full one makes texts wait, nothing is lost.
        draft: an OpenVINO folder that drafts, if given.
        properties: of the OpenVINO device, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``.
    """

    name = "openvino"

    def __init__(
        self,
        folder: Path,
        stop_ids: set[int],
        batch_size: int = 64,
        cache_gigabytes: int = 1,
        draft: Drafting | None = None,
        properties: dict[str, Any] | None = None,
    ) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = cache_gigabytes
        scheduler.max_num_seqs = batch_size
        scheduler.max_num_batched_tokens = 256
        given = dict(properties or {})
        self._gamma = 0
        if draft is not None:
            self._gamma = draft.num_assistant_tokens
            # γ + 1 places of every text must fit into one step.
            scheduler.max_num_batched_tokens = max(256, batch_size * (self._gamma + 1))
            given["draft_model"] = openvino_genai.draft_model(
                str(draft.folder), "CPU", **(properties or {})
            )
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(folder), scheduler, "CPU", given
        )
        self._stop_ids = stop_ids
        self._batch_size = batch_size

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        import numpy
        import openvino
        from openvino_genai import GenerationStatus

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
                while handle.can_read():
                    for output in handle.read().values():
                        ids.extend(output.generated_ids)
                        written += len(output.generated_ids)
                status = handle.get_status()
                if status == GenerationStatus.RUNNING:
                    continue
                if status != GenerationStatus.FINISHED:
                    raise FastDraftError(
                        f"OpenVINO gave up on text {index} ({status.name}); a prompt of "
                        f"{len(request.prompt_ids)} tokens may not fit its KV cache"
                    )
                yield completed(request, ids, self._stop_ids)
                del running[index]
            on_tokens(written)

    def _config(self, request: Request) -> Any:
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request.max_new_tokens
        config.do_sample = request.temperature > 0
        if config.do_sample:
            config.temperature = request.temperature
            config.top_p = request.top_p
            config.rng_seed = request.seed
        if self._gamma:
            config.num_assistant_tokens = self._gamma
        config.stop_token_ids = self._stop_ids
        return config
