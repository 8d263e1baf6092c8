"""Decoding through ``generate``, alone and with a draft, with a record of every round.

With a draft there are two paths: stock assisted generation (``transformers``) and our own loop
(``ours``). Both report their rounds here; greedy records of the two are equal. Stock prompt lookup
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
    """Make ``draft`` propose exactly ``num_assistant_tokens`` a round.

    transformers reads these three from the draft's own generation config and ignores them when
    they are passed to ``generate``.
    """
    apply_draft_settings(draft.generation_config, num_assistant_tokens)


# (path, row, drafted, accepted) of a round.
Tell = Callable[[DraftPath, int, int, int], None]


@contextlib.contextmanager
def tell_rounds(target: PreTrainedModel, tell: Tell) -> Iterator[None]:
    """Call ``tell`` for every round that ``target.generate`` runs in the block.

    Our loop tells through `records.listener`. transformers does not tell acceptance, so
    ``update_candidate_strategy`` of its candidate generator is wrapped; it is called once a round
    with the scores of all drafted positions plus one. The way there, ``_get_candidate_generator``,
    is private: `test_assisted.py` fails when it moves.
    """
    make, before = target._get_candidate_generator, listener.get()

    def recording(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        update = generator.update_candidate_strategy

        def update_and_tell(input_ids: Any, scores: Any, num_matches: Any) -> Any:
            tell("transformers", 0, int(scores.shape[1]) - 1, int(num_matches))
            return update(input_ids, scores, num_matches)

        generator.update_candidate_strategy = update_and_tell
        return generator

    def heard(row: int, drafted: int, accepted: int) -> None:
        tell("ours", row, drafted, accepted)
        if before is not None:
            before(row, drafted, accepted)

    nested = "_get_candidate_generator" in vars(target)
    target._get_candidate_generator = recording
    token = listener.set(heard)
    try:
        yield
    finally:
        listener.reset(token)
        if nested:
            target._get_candidate_generator = make
        else:
            del target._get_candidate_generator


@contextlib.contextmanager
def record_rounds(target: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """Collect (drafted, accepted) of every round that ``target.generate`` runs in the block.

    Rounds of stock assisted generation and of `fastdraft_hf.assisted_decoding` alike; of a batch,
    the rounds of all rows. `fastdraft_hf.record_decoding` keeps answers and rows apart.
    """
    rounds: list[tuple[int, int]] = []
    with tell_rounds(target, lambda path, row, *one: rounds.append(one)):
        yield rounds


class _FirstToken:
    """A streamer that notes when the first new token came; `generate` puts the prompt before it.

    Args:
        streamer: gets everything as well.
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
    """Wait for the models' GPUs: kernels run on after the call that started them returned."""
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
        target: the model whose text it is.
        prompt_ids: the prompt.
        task, key: written into the record.
        max_new_tokens: longest answer.
        temperature: 0 for greedy, else plain multinomial sampling at this temperature.
        seed: of the sampling.
        draft: the draft; ``None`` decodes with the target alone.
        num_assistant_tokens: γ. 0 with a draft and path ``ours`` runs our loop without drafting.
        path: ``ours`` decodes with the draft through `fastdraft_hf.assisted_decoding`;
            ``prompt-lookup`` copies γ tokens from the text and takes no draft.
        streamer: gets the prompt and the tokens as they come; what it does is measured too.
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
        # Stock prompt lookup copies past the longest answer; what nobody asked for is not counted.
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
