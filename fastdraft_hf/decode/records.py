"""What one decoded prompt gave: the tokens, and what became of every drafted block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# Who is told (row, drafted, accepted) of every round of our own loop; see `record_rounds`.
listener: ContextVar[Callable[[int, int, int], None] | None] = ContextVar("listener", default=None)


@dataclass
class DecodingRecord:
    """One prompt decoded once.

    Attributes:
        path: ``transformers``, ``ours``, ``prompt-lookup``, ``openvino`` (GenAI),
            ``openvino-prompt-lookup`` or ``ours-openvino``.
        task, key: which prompt.
        temperature: 0 is greedy.
        num_assistant_tokens: γ, tokens drafted a round; 0 is the target alone.
        tokens: new token ids.
        rounds: a pair (drafted, accepted) for every forward pass of the target, in order. Empty
            where the path does not tell; then the totals below hold.
        drafted, accepted: totals over the rounds.
        target_passes: forward passes of the target.
        seconds: wall clock of the whole call.
        first_token_seconds: wall clock until the first new token was there; ``None`` where nobody
            looked.
        counted_tokens: number of new tokens where the path tells it and not their ids.
    """

    path: str
    task: str
    key: str
    temperature: float
    num_assistant_tokens: int
    tokens: list[int]
    seconds: float
    target_passes: int
    drafted: int = 0
    accepted: int = 0
    rounds: list[tuple[int, int]] = field(default_factory=list)
    first_token_seconds: float | None = None
    counted_tokens: int = 0

    @property
    def new_tokens(self) -> int:
        """Number of tokens emitted."""
        return len(self.tokens) or self.counted_tokens

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecodingRecord:
        record = cls(**data)
        record.rounds = [(drafted, accepted) for drafted, accepted in record.rounds]
        return record
