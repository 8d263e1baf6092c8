"""vLLM in this process: the fast engine on a GPU, where vllm is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion, Request, checked


class VLLMEngine:
    """Keep up to ``batch_size`` completions in flight in a `vllm.LLM`.

    Args:
        folder: the target.
        stop_ids: token ids that end a completion.
        batch_size: completions in flight.
        device: ``cuda`` or ``cuda:N``, the GPU of this process.

    Raises:
        FastDraftError: vllm is not installed.
    """

    name = "vllm"

    def __init__(
        self, folder: Path, stop_ids: set[int], batch_size: int = 64, device: str = "cuda"
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise FastDraftError(
                "generate.engine: vllm is not installed; `pip install vllm`, or name a server in "
                "generate.server"
            )
        from vllm import LLM

        with _only_gpu(device):
            # The model's own generation config would add its top_k or repetition penalty.
            llm = LLM(model=str(folder), max_num_seqs=batch_size, generation_config="vllm")
        self._engine = llm.llm_engine
        self._vocab_size = llm.llm_engine.model_config.get_vocab_size()
        self._stop_ids, self._batch_size = stop_ids, batch_size

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], bool | None]
    ) -> Iterator[Completion]:
        from vllm import SamplingParams

        waiting = iter(requests)
        running: dict[str, Request] = {}
        seen: dict[str, int] = {}
        try:
            while True:
                while len(running) < self._batch_size:
                    request = next(waiting, None)
                    if request is None:
                        break
                    name = str(request.index)
                    sampling = SamplingParams(
                        temperature=request.temperature,
                        top_p=request.top_p,
                        seed=request.seed,
                        max_tokens=request.max_new_tokens,
                        stop_token_ids=sorted(self._stop_ids),
                        detokenize=False,
                    )
                    prompt = {"prompt_token_ids": list(request.prompt_ids)}
                    self._engine.add_request(name, prompt, sampling)
                    running[name] = request
                if not running:
                    return
                new = 0
                for output in self._engine.step():
                    result = output.outputs[0]
                    new += len(result.token_ids) - seen.get(output.request_id, 0)
                    seen[output.request_id] = len(result.token_ids)
                    if output.finished:
                        yield checked(
                            running.pop(output.request_id),
                            list(result.token_ids),
                            result.finish_reason,
                            result.stop_reason,
                            self._stop_ids,
                            self._vocab_size,
                            "vllm",
                        )
                if on_tokens(new):
                    return
        finally:
            self._engine.abort_request(list(running))


@contextlib.contextmanager
def _only_gpu(device: str) -> Iterator[None]:
    """Show one GPU to the process that vLLM starts: its worker takes the first that it sees."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if ":" in device:
        number = int(device.partition(":")[2])
        visible = before.split(",") if before else None
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else str(number)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
