"""The target's distribution over generated rows: the k most probable tokens and the tail's mass.

The target reads every row once, teacher-forced. For every token of a completion, k ids, k
log-probabilities and the logarithm of the remaining mass are stored: with a vocabulary of 49k and
k = 32, 130 bytes per token instead of 98,000. A stored row is what the trainer reads:
``input_ids``, ``labels`` and the columns of `columns`.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_of, last_hidden_states
from fastdraft_hf._processes import barrier, on_main, rank, world
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.columns import distribution_table, smallest_id_type, token_table
from fastdraft_hf.data.filters import kept_indices
from fastdraft_hf.data.parts import PartWriter, iter_rows, stored_indices

# Logarithm of the least mass of a tail: float32's least normal number is exp(-87.3), and a
# logarithm of zero would make divergences infinite.
FLOOR = -87.0
# Tokens whose logits are computed at a time: on a CPU few, so that their memory is reused; a GPU
# wants larger products.
_HEAD_TOKENS = 128
_HEAD_TOKENS_GPU = 1024
# Tokens of a batch, padding included.
BATCH_TOKENS = 4096
# Rows that are sorted by length together, so that batches have little padding.
_WINDOW = 512

# Ids [N, k], their log-probabilities [N, k], and the logarithm of the remaining mass [N].
TopK = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def top_k_of(logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Return ids [N, k] (most probable first), log-probabilities [N, k] and the tail's [N].

    Args:
        logits: [N, V].
        k: tokens to keep, at most V.
        temperature: divides the logits.
    """
    # A copy, changed in place: every pass over [N, V] counts.
    scores = (
        logits.float() / temperature if temperature != 1 else logits.to(torch.float32, copy=True)
    )
    values, ids = scores.topk(k, -1)
    values = values - values[:, :1]
    scores -= scores.gather(1, ids[:, :1])
    total = scores.exp_().sum(-1, keepdim=True)
    # Summed over the tail itself: total minus the top k would lose a small tail to rounding.
    rest = scores.scatter_(1, ids, 0.0).sum(-1)
    log_total = total.log()
    tail = (rest.log() - log_total[:, 0]).clamp(min=FLOOR)
    return ids, values - log_total, tail


def stored_bytes(tokens: int, k: int, vocab_size: int) -> int:
    """Return the size of ``tokens`` stored distributions, in bytes."""
    id_bytes = np.dtype(smallest_id_type(vocab_size)).itemsize
    return tokens * (k * (id_bytes + 2) + 2)


class DistributionReader(ABC):
    """The target, reading texts teacher-forced. ``vocab_size`` is V, the tokens that it scores."""

    vocab_size: int

    @abstractmethod
    def top(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int], k: int, temperature: float
    ) -> Iterator[list[TopK]]:
        """Yield for each text what `top_k_of` returns for its last tokens, in pieces.

        Args:
            texts: token ids.
            begins: for each text the first token to score, at least 1: nothing predicts token 0.
            k: tokens to keep.
            temperature: of the distribution.
        """


class LogitsReader(DistributionReader):
    """A target in this process, which gives all logits."""

    @abstractmethod
    def read(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int]
    ) -> Iterator[Iterator[torch.Tensor]]:
        """Yield for each text the logits that predict its last tokens.

        They come in pieces [n, V], in order. A piece may be overwritten by the next one.

        Args:
            texts, begins: of `top`.
        """

    def top(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int], k: int, temperature: float
    ) -> Iterator[list[TopK]]:
        for pieces in self.read(texts, begins):
            yield [top_k_of(piece, k, temperature) for piece in pieces]


class ModelReader(LogitsReader):
    """A PyTorch model that reads a padded batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._head = model, head_of(model)
        self.vocab_size = int(self._head.weight.shape[0])

    def read(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int]
    ) -> Iterator[Iterator[torch.Tensor]]:
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, text in enumerate(texts):
            ids[number, : len(text)], mask[number, : len(text)] = torch.tensor(text), 1
        device = self._model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        hidden = last_hidden_states(self._model, inputs)
        for states, text, begin in zip(hidden, texts, begins, strict=True):
            # The token at t is predicted from the hidden state at t − 1.
            yield self._pieces(states[begin - 1 : len(text) - 1])

    def _pieces(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        size = _HEAD_TOKENS if states.device.type == "cpu" else _HEAD_TOKENS_GPU
        for start in range(0, len(states), size):
            yield self._head.logits(states[start : start + size])


def write_target_logits(
    target: PreTrainedModel | DistributionReader,
    generated: Path,
    folder: Path,
    *,
    top_k: int,
    temperature: float,
) -> int:
    """Store the target's distribution for every completion token of a set's kept rows.

    Every process calls this, reads its share of the rows that are in no part of ``folder`` yet,
    and returns their number when all are stored.

    Args:
        target: a PyTorch model, or another reader of the target.
        generated: folder of the set, as stage generate writes it.
        folder: of the parts.
        top_k: tokens to keep.
        temperature: of the distribution.

    Raises:
        FastDraftError: a part is damaged, or the disk is full.
    """
    reader = target if isinstance(target, DistributionReader) else ModelReader(target)
    if top_k > reader.vocab_size:
        raise FastDraftError(
            f"logits.top_k: {top_k} is more than the target's vocabulary of {reader.vocab_size}"
        )

    def look() -> tuple[int, np.ndarray]:
        kept, _ = kept_indices(generated)
        return len(kept), np.setdiff1d(kept, stored_indices(folder))

    rows, missing = on_main(look)
    mine = missing[rank() :: world()]
    found = rows - len(missing)
    with (
        Progress(f"logits {folder.name}", found + len(mine), "rows", done=found) as progress,
        PartWriter(folder) as writer,
        torch.inference_mode(),
    ):
        for batch in _batches(generated, mine):
            writer.add(_stored_table(reader, batch, top_k, temperature))
            progress.advance(len(batch))
    barrier()
    return rows


def _batches(generated: Path, wanted: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    """Group rows of similar length so that a padded batch has at most `BATCH_TOKENS` tokens."""

    def length(row: dict[str, Any]) -> int:
        return len(row["prompt_ids"]) + len(row["completion_ids"])

    rows = iter_rows(generated, ["prompt_ids", "completion_ids"], only=wanted)
    while len(wanted) and (window := list(itertools.islice(rows, _WINDOW))):
        batch: list[dict[str, Any]] = []
        for row in sorted(window, key=length):
            if batch and length(row) * (len(batch) + 1) > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(row)
        yield batch


def _stored_table(
    reader: DistributionReader, rows: Sequence[dict[str, Any]], k: int, temperature: float
) -> Any:
    """Return the stored rows of a batch as an arrow table."""
    texts = [[*row["prompt_ids"], *row["completion_ids"]] for row in rows]
    # Nothing predicts a first token.
    begins = [max(1, len(row["prompt_ids"])) for row in rows]
    kind = smallest_id_type(reader.vocab_size)
    stored = []
    for text, parts in zip(texts, reader.top(texts, begins, k, temperature), strict=True):
        if not parts:  # one token without a past
            parts = [(torch.zeros(0, k), torch.zeros(0, k), torch.zeros(0))]
        if not all(part[1].isfinite().all() for part in parts):
            raise FastDraftError(
                "logits: the target's logits are not finite; look at its weights, or load it in a "
                "wider type"
            )
        ids, log_probs, tail = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        stored.append(
            (len(text), ids.astype(kind), log_probs.astype(np.float16), tail.astype(np.float16))
        )
    names = ("index", "prompt_ids", "completion_ids")
    table = token_table(*([row[name] for row in rows] for name in names))
    found = distribution_table(stored, temperature)
    for name in found.column_names:
        table = table.append_column(name, found[name])
    return table
