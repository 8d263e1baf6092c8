"""An answer watched while it is written: its tokens, and which of them the draft wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft_hf.decode.assisted import DraftPath, decode, tell_rounds
from fastdraft_hf.decode.records import DecodingRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What an unfinished character of several bytes is decoded to.
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """One token of an answer.

    Attributes:
        token: its id.
        text: what it adds to the answer; empty while a character is not whole.
        accepted: whether the draft proposed it and the target accepted it; otherwise it is the
            target's own.
    """

    token: int
    text: str
    accepted: bool


class LiveText:
    """A streamer that knows for every token whether it was drafted and accepted.

    ``generate`` hands over the tokens of a round, then the round is told (`tell_rounds`): of n
    accepted tokens the first n of the round are the draft's, and what follows is the target's own.
    Of the target alone no rounds are told.

    Args:
        tokenizer: of both models.
        assisted: whether rounds will be told.
        changed: called with this object after every round, and at the end. The clock stands still
            meanwhile, so that drawing a terminal is not measured.

    Attributes:
        pieces: what was written so far.
        passes: rounds so far; of the target alone, tokens.
        paused: seconds spent in ``changed``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        assisted: bool,
        changed: Callable[[LiveText], None] | None = None,
    ) -> None:
        self.pieces: list[Piece] = []
        self.passes = 0
        self.paused = 0.0
        self._texts = _TokenTexts(tokenizer)
        self._assisted = assisted
        self._changed = changed
        self._pending: list[int] = []
        self._prompt_seen = False
        self._start = time.perf_counter()
        self._seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of writing so far; of a finished answer, the record's."""
        if self._seconds is not None:
            return self._seconds
        return time.perf_counter() - self._start - self.paused

    @property
    def tokens_per_second(self) -> float:
        return len(self.pieces) / self.seconds if self.pieces and self.seconds > 0 else 0.0

    def put(self, value: Any) -> None:
        """Take tokens from ``generate``, whose first call is the prompt."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._pending += value.flatten().tolist()
        if not self._assisted:
            self._settle(0)

    def told(self, path: DraftPath, row: int, drafted: int, accepted: int) -> None:
        """Take what became of the round whose tokens were put last."""
        # Every round ends with a token of the target's own, also where an end token cuts it.
        self._settle(min(accepted, len(self._pending) - 1))

    def end(self) -> None:
        """Settle what no round was told of: decoding fell back to the target alone."""
        if self._pending:
            self._settle(0)

    def finish(self, record: DecodingRecord) -> None:
        """Take the measured seconds, and show the whole answer."""
        record.seconds -= self.paused
        self._seconds = record.seconds
        rest = self._texts.rest()
        if rest and self.pieces:
            last = self.pieces[-1]
            self.pieces[-1] = Piece(last.token, last.text + rest, last.accepted)
        if self._changed is not None:
            self._changed(self)

    def _settle(self, accepted: int) -> None:
        tokens, self._pending = self._pending, []
        self.passes += 1
        for place, token in enumerate(tokens):
            self.pieces.append(Piece(token, self._texts.add(token), place < accepted))
        if self._changed is not None:
            start = time.perf_counter()
            self._changed(self)
            self.paused += time.perf_counter() - start


class _TokenTexts:
    """What each token adds to a text; a character of several tokens comes with its last one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Tokens from `_context` on are decoded, of which those before `_told` were told: some
        # tokenizers write a token otherwise at the beginning of a text than inside it.
        self._context = self._told = 0

    def add(self, token: int) -> str:
        self._ids.append(token)
        new = self._new()
        if new.endswith(_UNFINISHED):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return new

    def rest(self) -> str:
        """Return what an unfinished character at the end of the answer is decoded to."""
        new = self._new()
        self._told = len(self._ids)
        return new

    def _new(self) -> str:
        before = self._decode(self._ids[self._context : self._told])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def decode_live(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    *,
    key: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    draft: PreTrainedModel | None = None,
    num_assistant_tokens: int = 0,
    path: DraftPath = "ours",
    changed: Callable[[LiveText], None] | None = None,
) -> tuple[DecodingRecord, LiveText]:
    """Decode one prompt and show it while it is written.

    Args:
        target, prompt_ids, key, max_new_tokens, temperature, seed, draft, num_assistant_tokens,
            path: as of `fastdraft_hf.decode.assisted.decode`.
        tokenizer: of both models.
        changed: see `LiveText`.

    Returns:
        the record, whose seconds are without those spent in ``changed``, and the pieces.
    """
    live = LiveText(tokenizer, assisted=draft is not None, changed=changed)
    with tell_rounds(target, live.told):
        record = decode(
            target,
            prompt_ids,
            task="demo",
            key=key,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            draft=draft,
            num_assistant_tokens=num_assistant_tokens,
            path=path,
            streamer=live,
        )
    live.finish(record)
    return record, live
