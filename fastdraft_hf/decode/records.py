"""Records of decoded prompts: tokens, time, and the outcome of every drafted block."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_text

# Called with (row, drafted, accepted) after every round of our own loop; see `record_rounds`.
listener: ContextVar[Callable[[int, int, int], None] | None] = ContextVar("listener", default=None)


@dataclass
class DecodingRecord:
    """One prompt decoded once.

    Attributes:
        path: ``transformers``, ``ours``, ``prompt-lookup``, ``openvino`` (GenAI),
            ``openvino-prompt-lookup`` or ``ours-openvino``.
        task, key: which prompt.
        temperature: 0 is greedy.
        num_assistant_tokens: γ, drafted tokens per round; 0 is the target alone.
        tokens: new token ids.
        rounds: a pair (drafted, accepted) for every forward pass of the target, in order. Empty
            where the path reports totals only.
        drafted, accepted: totals over the rounds.
        target_passes: forward passes of the target.
        seconds: wall clock of the whole call.
        first_token_seconds: wall clock until the first new token; ``None`` where not measured.
        counted_tokens: number of new tokens where the path reports it and not their ids.
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

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecodingRecord:
        record = cls(**data)
        record.rounds = [(drafted, accepted) for drafted, accepted in record.rounds]
        return record


class DecodingRecords(list[DecodingRecord]):
    """Records of answers, in order."""

    def columns(self) -> dict[str, list[Any]]:
        """Return the four columns that the metrics read, one value per answer."""
        names = ("drafted", "accepted", "new_tokens", "target_passes")
        return {name: [getattr(r, name) for r in self] for name in names}

    def save(self, path: str | Path) -> None:
        """Write JSON lines: one row per answer, the fields of `DecodingRecord`.

        The column ``new_tokens`` is added, so that the metrics can read the file's columns.
        """
        rows = [{**dataclasses.asdict(record), "new_tokens": record.new_tokens} for record in self]
        write_text(Path(path), "".join(json.dumps(row) + "\n" for row in rows))

    @classmethod
    def load(cls, path: str | Path) -> DecodingRecords:
        """Read a file of `save`, or the ``records.jsonl`` of stage evaluate or bench."""
        rows = map(json.loads, Path(path).read_text("utf-8").splitlines())
        # A stage's file has each record beside its label; `save` adds a column.
        records = [row.get("record", row) for row in rows]
        for record in records:
            record.pop("new_tokens", None)
        return cls(map(DecodingRecord.from_dict, records))
