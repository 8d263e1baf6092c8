"""Decode through ``generate``, alone and with a draft, and record every round.

With a draft there are two paths: stock assisted generation (``transformers``) and our own loop
(``ours``). Both report their rounds, and their greedy records are equal. Stock prompt lookup
(``prompt-lookup``) drafts without a model, by copying from the text.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastdraft_hf.decode.records import DecodingRecord, listener
from fastdraft_hf.decode.settings import apply_draft_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer


DraftPath = Literal["transformers", "ours", "prompt-lookup"]


def set_draft_length(draft: PreTrainedModel, num_assistant_tokens: int) -> None:
    """Make ``draft`` propose exactly ``num_assistant_tokens`` per round.

    transformers reads this from the draft's own generation config and ignores what is passed to
    ``generate``.
    """
    apply_draft_settings(draft.generation_config, num_assistant_tokens)


# Called with (path, row, drafted, accepted) of a round.
Report = Callable[[DraftPath, int, int, int], None]


@contextlib.contextmanager
def report_rounds(target: PreTrainedModel, report: Report) -> Iterator[None]:
    """Call ``report`` for every round that ``target.generate`` runs in the block."""
    from fastdraft_hf.decode.patches import watch_stock_rounds

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
    """A streamer that notes the time of the first new token; `generate` puts the prompt first.

    Args:
        streamer: receives everything as well.
    """

    def __init__(self, streamer: BaseStreamer | None = None) -> None:
        self.time: float | None = None
        self._prompt_seen = False
        self._streamer = streamer

    def put(self, value: Any) -> None:
        if self._prompt_seen and self.time is None:
            self.time = time.perf_counter()
        self._prompt_seen = True
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


def _synchronize(*models: Any) -> None:
    """Wait for the models' GPUs: kernels run on after the call that started them has returned."""
    import torch

    for device in {model.device for model in models if model is not None}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def decode(
    target: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    task: str,
    key: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    draft: PreTrainedModel | None = None,
    num_assistant_tokens: int = 0,
    path: DraftPath = "transformers",
    streamer: BaseStreamer | None = None,
) -> DecodingRecord:
    """Decode one prompt with ``target.generate``, assisted when a draft is given.

    Args:
        target: the model that decodes.
        prompt_ids: the prompt.
        task, key: written into the record.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 for greedy, else plain multinomial sampling at this temperature.
        seed: of the sampling.
        draft: the draft; ``None`` decodes with the target alone.
        num_assistant_tokens: γ. 0 with a draft and path ``ours`` runs our loop without drafting.
        path: ``ours`` decodes with the draft through `fastdraft_hf.assisted_decoding`;
            ``prompt-lookup`` copies γ tokens from the text and takes no draft.
        streamer: receives the prompt and the tokens as they come; its own time counts too.
    """
    import torch
    from transformers import set_seed

    inputs = torch.tensor([list(prompt_ids)], device=target.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        set_seed(seed)
    if draft is not None:
        set_draft_length(draft, num_assistant_tokens)
        sampling["assistant_model"] = draft
        if path == "ours":
            from fastdraft_hf.decode.speculative import assisted_decoding

            sampling["custom_generate"] = assisted_decoding
    elif path == "prompt-lookup":
        sampling["prompt_lookup_num_tokens"] = num_assistant_tokens
    drafting = draft is not None or path == "prompt-lookup"
    first = _FirstToken(streamer)
    with torch.inference_mode(), record_rounds(target) as rounds:
        _synchronize(target, draft)
        start = time.perf_counter()
        output = target.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            streamer=first,
            **sampling,
        )
        _synchronize(target, draft)
        seconds = time.perf_counter() - start
    tokens = output[0, inputs.shape[1] :].tolist()
    beyond = len(tokens) - max_new_tokens
    if beyond > 0:
        # Stock prompt lookup copies past the longest answer; the surplus is not counted.
        tokens = tokens[:max_new_tokens]
        rounds[-1] = (rounds[-1][0], max(0, rounds[-1][1] - beyond))
    return DecodingRecord(
        path=path if drafting else "transformers",
        task=task,
        key=key,
        temperature=temperature,
        num_assistant_tokens=num_assistant_tokens if drafting else 0,
        tokens=tokens,
        seconds=seconds,
        target_passes=len(rounds) if drafting else len(tokens),
        drafted=sum(d for d, _ in rounds),
        accepted=sum(a for _, a in rounds),
        rounds=list(rounds),
        first_token_seconds=None if first.time is None else first.time - start,
    )
