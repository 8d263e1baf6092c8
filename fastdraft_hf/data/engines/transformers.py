"""``transformers.generate`` in batches of similar length: works wherever the target runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf.data.engines import Completion, Request, completed

if TYPE_CHECKING:
    import torch


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
        import torch

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
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
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
        import torch
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
        import torch

        self.batch, self.over, self._on_tokens = batch, False, on_tokens
        self.width = max(len(request.prompt_ids) for request in batch)
        self._limits = torch.tensor([request.max_new_tokens for request in batch])
        self._stops = torch.tensor(sorted(stop_ids))
        self._running = torch.ones(len(batch), dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows [B] are done."""
        import torch

        new = int(self._running.sum())
        self._running &= ~torch.isin(input_ids[:, -1].cpu(), self._stops)
        self._running &= input_ids.shape[1] - self.width < self._limits
        self.over = bool(self._on_tokens(new))
        return (~self._running | self.over).to(input_ids.device)
