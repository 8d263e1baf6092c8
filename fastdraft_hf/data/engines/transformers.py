"""``transformers.generate`` in batches of similar length: works wherever the target runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastdraft_hf.data.engines import Completion
from fastdraft_hf.data.requests import Request


class TransformersEngine:
    """Batched generation, left-padded.

    A batch shares one seed (its first row's) and one temperature, so requests are grouped by
    temperature and sorted by length within a window.
    """

    name = "transformers"

    def __init__(
        self, folder: Path, stop_ids: set[int], batch_size: int = 64, device: str = "cpu"
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._device = device
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self._device)
        self._model.eval()
        self._stop_ids = stop_ids
        self._batch_size = batch_size

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        waiting = iter(requests)
        while window := list(islice(waiting, self._batch_size * 8)):
            window.sort(key=lambda r: (r.temperature, len(r.prompt_ids)))
            while window:
                batch = [r for r in window if r.temperature == window[0].temperature]
                batch = batch[: self._batch_size]
                taken = {r.index for r in batch}
                window = [r for r in window if r.index not in taken]
                for completion in self._write(batch):
                    on_tokens(len(completion.ids))
                    yield completion

    def _write(self, batch: list[Request]) -> list[Completion]:
        import torch
        from transformers import set_seed

        width = max(len(r.prompt_ids) for r in batch)
        pad = min(self._stop_ids)
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            start = width - len(request.prompt_ids)
            ids[row, start:] = torch.tensor(request.prompt_ids)
            mask[row, start:] = 1
        temperature = batch[0].temperature
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            set_seed(batch[0].seed)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max(r.max_new_tokens for r in batch),
                eos_token_id=sorted(self._stop_ids),
                pad_token_id=pad,
                **sampling,
            )
        rows = output[:, width:].tolist()
        return [self._cut(request, row) for request, row in zip(batch, rows, strict=True)]

    def _cut(self, request: Request, row: list[int]) -> Completion:
        """End a row at its first stop token; what follows is the batch's padding."""
        row = row[: request.max_new_tokens]
        for position, token in enumerate(row):
            if token in self._stop_ids:
                return Completion(request, tuple(row[: position + 1]), "stop")
        return Completion(request, tuple(row), "length")
