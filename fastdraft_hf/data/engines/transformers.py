"""``transformers.generate`` in batches of similar length: works wherever the target runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf.data.engines import Completion, Drafting, completed
from fastdraft_hf.data.requests import Request

if TYPE_CHECKING:
    import torch


class RowSampler:
    """A logits processor that draws every row's next token by the row's own seed.

    ``generate`` samples a whole batch from one stream of random numbers, so that a row would
    depend on its neighbours. This leaves one token of each sampled row possible and is used with
    ``do_sample=False``; greedy rows stay as they are. The token is the one at which the cumulative
    probability passes the row's next random number, most probable first.

    Args:
        requests: the rows of the batch, in order: temperature, top_p, seed, max_new_tokens.
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
        """Return scores [B, V] in which a sampled row has one finite entry."""
        step = input_ids.shape[1] - self._start
        if not self._rows or step >= self._draws.shape[1]:  # only longer, greedy rows are left
            return scores
        device = scores.device
        chosen = scores[self._rows].float() / self._temperature.to(device)
        logits, tokens = chosen.sort(dim=-1, descending=True, stable=True)
        total = logits.double().softmax(-1).cumsum(-1)
        # The nucleus is the shortest prefix with at least top_p of the mass.
        inside = (total < self._top_p.to(device)).sum(-1, keepdim=True)
        mass = total.gather(1, inside.clamp(max=total.shape[1] - 1))
        draws = self._draws[:, step, None].to(device) * mass
        place = (total <= draws).sum(-1, keepdim=True).clamp(max=total.shape[1] - 1)
        token = tokens.gather(1, place)
        kept = scores[self._rows].gather(1, token)
        forced = scores.new_full((len(self._rows), scores.shape[1]), float("-inf"))
        scores = scores.clone()
        scores[self._rows] = forced.scatter_(1, token, kept)
        return scores


class TransformersEngine:
    """Batched generation, padded on the left, sorted by length within a window.

    A seed belongs to its row, so that a row comes out the same in any batch, but for rounding.
    With a draft, sampled batches are drawn from one stream (the first row's seed), and a batch
    holds one temperature and top_p.

    Args:
        folder: the target.
        stop_ids: token ids that end a text.
        batch_size: texts written at once.
        device: ``cpu``, ``cuda`` or ``cuda:N``; bfloat16 on a GPU, float32 on a CPU.
        draft: a PyTorch folder that drafts, with its ``decode``, if given.
    """

    name = "transformers"

    def __init__(
        self,
        folder: Path,
        stop_ids: set[int],
        batch_size: int = 64,
        device: str = "cpu",
        draft: Drafting | None = None,
    ) -> None:
        import torch

        self._device = device
        self._dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._model = self._load(folder)
        # What the target's own generation config asks for besides (top_k, a repetition penalty)
        # would change the distribution that the draft learns; an engine writes the target's own.
        self._model.generation_config = _plain_config(self._model.generation_config)
        self._draft: Any = None
        self._decode: Callable[..., Any] | None = None
        if draft is not None:
            if draft.decode is None:
                raise ValueError("the transformers engine needs Drafting.decode")
            self._decode, self._draft = draft.decode, self._load(draft.folder)
            config = self._draft.generation_config
            config.num_assistant_tokens = draft.num_assistant_tokens
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = 0.0
        self._stop_ids = stop_ids
        self._batch_size = batch_size

    def _load(self, folder: Path) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype)
        return model.to(self._device).eval()

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        waiting = iter(requests)
        while window := list(islice(waiting, self._batch_size * 8)):
            window.sort(key=lambda r: (self._kind(r), len(r.prompt_ids)))
            while window:
                batch = [r for r in window if self._kind(r) == self._kind(window[0])]
                batch = batch[: self._batch_size]
                window = window[len(batch) :]
                for completion in self._write(batch):
                    on_tokens(len(completion.ids))
                    yield completion

    def _kind(self, request: Request) -> tuple[float, float]:
        """Return what rows of a batch must share."""
        return (request.temperature, request.top_p) if self._draft is not None else (0.0, 1.0)

    def _write(self, batch: list[Request]) -> list[Completion]:
        import torch

        width = max(len(r.prompt_ids) for r in batch)
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
                max_new_tokens=max(r.max_new_tokens for r in batch),
                eos_token_id=sorted(self._stop_ids),
                pad_token_id=pad,
                **self._how(batch, width),
            )
        rows = output[:, width:].tolist()
        return [completed(r, row, self._stop_ids) for r, row in zip(batch, rows, strict=True)]

    def _how(self, batch: list[Request], width: int) -> dict[str, Any]:
        from transformers import LogitsProcessorList, set_seed

        if self._draft is None:
            processors = LogitsProcessorList([RowSampler(batch, width)])
            return {"do_sample": False, "logits_processor": processors}
        how: dict[str, Any] = {"assistant_model": self._draft, "custom_generate": self._decode}
        first = batch[0]
        if first.temperature == 0:
            return how | {"do_sample": False}
        set_seed(first.seed)
        sampling = {"temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
        return how | {"do_sample": True} | sampling


def _plain_config(config: Any) -> Any:
    """Return a generation config that keeps a model's special tokens and nothing else."""
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(config, name) for name in names})
