"""The rows of a call: ids, lengths and positions, and when a row is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

# Criteria that decide about each row of a batch by itself.
ROW_BY_ROW = {EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria}


class Text:
    """The prompt and the new tokens, row by row.

    Column c of a row is its token c, padding on the left included. Its position is c minus the
    row's offset.

    Args:
        input_ids: [B, L] the prompt.
        mask: [B, L] its attention mask, or ``None`` when all of it counts.
        positions: [B, L] its position ids.
        pad: the id that fills rows which end early.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        pad: int,
    ) -> None:
        rows, length = input_ids.shape
        self.device = input_ids.device
        self.prompt_length = length
        self.mask = mask
        self.positions = positions
        self.lengths = [length] * rows
        self.offsets = [length - 1 - int(p) for p in positions[:, -1].tolist()]
        self._pad = pad
        self._ids = torch.full((rows, length + 64), pad, dtype=torch.long, device=self.device)
        self._ids[:, :length] = input_ids

    def row(self, row: int, length: int) -> torch.Tensor:
        """Return the first ``length`` ids of a row as [1, length]."""
        return self._ids[row : row + 1, :length]

    def append(self, row: int, new: Sequence[int]) -> None:
        start = self.lengths[row]
        end = start + len(new)
        rows, room = self._ids.shape
        if end > room:
            more = self._ids.new_full((rows, max(room, end - room)), self._pad)
            self._ids = torch.cat([self._ids, more], 1)
        self._ids[row, start:end] = torch.tensor(new, device=self.device)
        self.lengths[row] = end

    def whole(self) -> torch.Tensor:
        """Return [B, longest] ids; rows that ended early are padded right."""
        return self._ids[:, : max(self.lengths)].clone()

    def unseen(
        self, active: Sequence[int], seen: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the tokens that a model whose cache holds the first ``seen`` columns must read.

        Args:
            active: rows of the text, in the order of the model's batch.
            seen: for each of them, the number of columns read.

        Returns:
            tokens [b, w], positions [b, w] and validity [b, w] or ``None``. Rows with fewer than w
            unread tokens get earlier ones in front, marked invalid.
        """
        lengths = [self.lengths[r] for r in active]
        width = max(length - s for length, s in zip(lengths, seen, strict=True))
        if min(lengths) == self.prompt_length == max(lengths):
            # Still the prompt, whose mask and positions were given; all rows are active.
            start = self.prompt_length - width
            valid = None if self.mask is None else self.mask[:, start:].bool()
            return self._ids[:, start : self.prompt_length], self.positions[:, start:], valid
        device = self.device
        if len(active) == 1:
            row, length = active[0], lengths[0]
            first = length - width - self.offsets[row]
            positions = torch.arange(first, first + width, device=device)[None]
            return self._ids[row : row + 1, length - width : length], positions, None
        columns = torch.tensor(lengths, device=device)[:, None] - width
        columns = columns + torch.arange(width, device=device)
        tokens = self._ids[torch.tensor(active, device=device)[:, None], columns.clamp(min=0)]
        offsets = torch.tensor([self.offsets[r] for r in active], device=device)[:, None]
        valid = None
        if any(length - s != width for length, s in zip(lengths, seen, strict=True)):
            valid = columns >= torch.tensor(seen, device=device)[:, None]
        return tokens, (columns - offsets).clamp(min=0), valid


def followed_by(
    more: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Put the tokens ``more`` [B, m] behind what `Text.unseen` returned."""
    if more.shape[1]:
        steps = torch.arange(1, more.shape[1] + 1, device=positions.device)
        tokens = torch.cat([tokens, more], 1)
        positions = torch.cat([positions, positions[:, -1:] + steps], 1)
        if valid is not None:
            valid = torch.cat([valid, torch.ones_like(more, dtype=torch.bool)], 1)
    return tokens, positions, valid


@dataclass
class Stops:
    """When a row is done; ``others`` are called after every new token with that row alone."""

    max_length: int
    ends: frozenset[int] = frozenset()
    others: list[Any] = field(default_factory=list)

    @classmethod
    def read(cls, criteria: StoppingCriteriaList, config: GenerationConfig) -> Stops:
        """Read length limits and end tokens from `generate`'s criteria; keep the others."""
        stops = cls(int(config.max_length))
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                stops.max_length = min(stops.max_length, criterion.max_length)
            elif type(criterion) is EosTokenCriteria:
                stops.ends |= frozenset(criterion.eos_token_id.flatten().tolist())
            else:
                stops.others.append(criterion)
        return stops

    def to_end(self, tokens: list[int]) -> list[int]:
        """Return tokens up to the first end token."""
        return tokens[: next((n for n, token in enumerate(tokens, 1) if token in self.ends), None)]

    def cut(self, text: Text, row: int, new: list[int]) -> tuple[list[int], bool]:
        """Append ``new`` to a row up to its first stop; return what was added, and if it ended."""
        new = self.to_end(new)
        done = bool(new) and new[-1] in self.ends
        room = self.max_length - text.lengths[row]
        if len(new) >= room:
            new, done = new[:room], True
        if not self.others:
            text.append(row, new)
            return new, done
        for count, token in enumerate(new, 1):
            text.append(row, [token])
            ids = text.row(row, text.lengths[row])
            if any(bool(torch.as_tensor(c(ids, None)).all()) for c in self.others):
                return new[:count], True
        return new, done
