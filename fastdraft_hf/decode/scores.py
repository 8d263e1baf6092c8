"""`generate`'s logits processors, applied alike to what the draft and the target say.

Sampling is exact for any draft distribution; processing both alike keeps acceptance high.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

# Processors that look at one row of scores and at nothing else, so that all rows and places of a
# block are processed in one call.
_ROW_BY_ROW = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
    "SuppressTokensLogitsProcessor",
}
# Processors that carry a state from step to step, which taking tokens back would falsify.
STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
}
# Processors that know rows by their number in the batch.
BY_ROW_NUMBER = {
    "PrefixConstrainedLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "AlternatingCodebooksLogitsProcessor",
}

# (row, place) -> the ids [1, length] that the scores of that place follow.
Prefix = Callable[[int, int], torch.Tensor]


class Scores:
    """Logits to scores.

    Args:
        processors: as `generate` prepared them.
        vocabulary: V, the target's.
    """

    def __init__(self, processors: LogitsProcessorList | list[Any], vocabulary: int) -> None:
        self._processors = processors
        self.vocabulary = vocabulary
        self.untouched = not processors
        self._row_by_row = all(type(p).__name__ in _ROW_BY_ROW for p in processors)

    def widen(self, logits: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """Return logits [..., V'] of a head that scores other columns as float32 [..., V].

        Tokens without a column get minus infinity; columns beyond the target's vocabulary
        (padding of the embedding) are left out.
        """
        logits = logits.float()
        if token_ids is None:
            surplus = logits.shape[-1] - self.vocabulary
            if surplus == 0:
                return logits
            if surplus > 0:
                return logits[..., : self.vocabulary]
            token_ids = torch.arange(logits.shape[-1], device=logits.device)
        wide = logits.new_full((*logits.shape[:-1], self.vocabulary), float("-inf"))
        wide[..., token_ids] = logits
        return wide

    def __call__(self, logits: torch.Tensor, prefix: Prefix) -> torch.Tensor:
        """Return processed scores of float32 logits [B, k, V]; the logits stay as they are."""
        if self.untouched:
            return logits
        rows, places, width = logits.shape
        if self._row_by_row:
            flat = logits.reshape(rows * places, width)
            ids = torch.zeros(rows * places, 1, dtype=torch.long, device=logits.device)
            return self._run(ids, flat).view(rows, places, width)
        processed = torch.empty_like(logits)
        for row in range(rows):
            for place in range(places):
                one = logits[row, place][None].clone()
                processed[row, place] = self._run(prefix(row, place), one)[0]
        return processed

    def _run(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for processor in self._processors:
            scores = processor(ids, scores)
        return scores
