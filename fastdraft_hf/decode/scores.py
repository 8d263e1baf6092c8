"""`generate`'s logits processors, applied to the logits of the draft and of the target.

Sampling is exact for any draft distribution; processing both alike keeps acceptance high.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

# Processors that look at one row of scores and at nothing else, so that all rows and positions of a
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
# transformers' own processors that carry a state from token to token.
_STATEFUL = {
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
# Attributes of processors that hold one value per row of the batch (transformers 5.24).
_PER_ROW = ("prompt_ignore_length",)

# (row of the block, position of the block) -> the ids [1, length] before that position.
Prefix = Callable[[int, int], torch.Tensor]


def keeps_state(processor: Any) -> bool:
    """Return whether a processor may remember earlier calls.

    transformers' own are known. A user's may hold a cursor, a budget or a grammar, so it must be
    called once per emitted token, in order, as it is without a draft.
    """
    known = type(processor).__module__ == "transformers.generation.logits_process"
    return not known or type(processor).__name__ in _STATEFUL


def widen(logits: torch.Tensor, token_ids: torch.Tensor | None, vocabulary: int) -> torch.Tensor:
    """Return logits [..., V'] of a head with other columns as float32 [..., V].

    Tokens without a column get minus infinity. Columns beyond the target's vocabulary (padding
    of the embedding) are left out.
    """
    logits = logits.float()
    if token_ids is None:
        if logits.shape[-1] >= vocabulary:
            return logits[..., :vocabulary]
        token_ids = torch.arange(logits.shape[-1], device=logits.device)
    wide = logits.new_full((*logits.shape[:-1], vocabulary), float("-inf"))
    wide[..., token_ids] = logits
    return wide


class Scores:
    """Logits to scores, by the processors that `generate` prepared.

    Attributes:
        untouched: whether scores are the logits.
        in_order: whether the target's positions must be processed one by one, as tokens are
            emitted (`step`).
    """

    def __init__(
        self, processors: LogitsProcessorList | Sequence[Any], vocabulary: int, rows: int = 1
    ) -> None:
        self.vocabulary = vocabulary
        self.untouched = not processors
        self.in_order = any(map(keeps_state, processors))
        self._all = list(processors)
        # What remembers nothing may be asked about tokens that are never emitted.
        self._free = [p for p in processors if not keeps_state(p)]
        self._row_by_row = all(type(p).__name__ in _ROW_BY_ROW for p in self._free)
        self._of_row = [[_for_row(p, row, rows) for p in self._free] for row in range(rows)]

    def __call__(self, logits: torch.Tensor, prefix: Prefix, rows: Sequence[int]) -> torch.Tensor:
        """Return scores of float32 logits [B, k, V] by the processors without a state.

        Args:
            logits: are left as they are.
            prefix: the text before each position.
            rows: [B] the rows' numbers in the batch.
        """
        if not self._free:
            return logits
        count, positions, width = logits.shape
        if self._row_by_row:
            flat = logits.reshape(count * positions, width)
            ids = torch.zeros(count * positions, 1, dtype=torch.long, device=logits.device)
            return _run(self._free, ids, flat).view(count, positions, width)
        processed = torch.empty_like(logits)
        for index, row in enumerate(rows):
            for position in range(positions):
                one = logits[index, position][None].clone()
                ids = prefix(index, position)
                processed[index, position] = _run(self._of_row[row], ids, one)[0]
        return processed

    def step(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the scores [1, V] after ids [1, length] by every processor, once per token."""
        return _run(self._all, ids, logits.clone())


def _for_row(processor: Any, row: int, rows: int) -> Any:
    """Return the processor as one row of a batch sees it."""
    for name in _PER_ROW:
        value = getattr(processor, name, None)
        if rows > 1 and isinstance(value, torch.Tensor) and value.shape[0] == rows:
            processor = copy.copy(processor)
            setattr(processor, name, value[row : row + 1])
    return processor


def _run(processors: Sequence[Any], ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    for processor in processors:
        scores = processor(ids, scores)
    return scores
