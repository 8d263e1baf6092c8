"""The target's distribution over text it wrote: the k most probable tokens and the rest's mass.

A finished set of generated rows is read once by the target, teacher-forced, and for every token
of a completion k ids, k log-probabilities and the logarithm of the remaining mass are kept: with a
vocabulary of 49k and k = 32 that is 130 bytes a token instead of 98,000.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdraft_hf._atomic import atomic_file, sha256_file, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_of, last_hidden_states
from fastdraft_hf.data.columns import smallest_id_type

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MANIFEST = "manifest.json"
# Logarithm of the least mass the rest may have: float32's least normal number is exp(-87.3), and a
# logarithm of zero would make divergences infinite.
FLOOR = -87.0
# Tokens whose logits are made at a time: on a CPU few enough that their memory is used again and
# again instead of being asked of the system anew; a GPU wants larger products.
_HEAD_TOKENS = 128
_HEAD_TOKENS_GPU = 1024


def top_k_of(
    logits: torch.Tensor, k: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids [N, k] (most probable first), log-probabilities [N, k] and the rest's [N].

    Args:
        logits: [N, V].
        k: tokens to keep, at most V.
        temperature: logits are divided by it first.
    """
    import torch

    # A copy: it is changed in place, and every pass over [N, V] counts.
    scores = (
        logits.float() / temperature if temperature != 1 else logits.to(torch.float32, copy=True)
    )
    values, ids = scores.topk(k, -1)
    values = values - values[:, :1]
    scores -= scores.gather(1, ids[:, :1])
    total = scores.exp_().sum(-1, keepdim=True)
    # Summed over the rest itself: total − Σ would lose a small rest to rounding.
    rest = scores.scatter_(1, ids, 0.0).sum(-1)
    log_total = total.log()
    tail = (rest.log() - log_total[:, 0]).clamp(min=FLOOR)
    return ids, values - log_total, tail


def stored_bytes(tokens: int, k: int, vocab_size: int) -> int:
    """Return what ``tokens`` stored distributions take, in bytes."""
    id_bytes = np.dtype(smallest_id_type(vocab_size)).itemsize
    return tokens * (k * (id_bytes + 2) + 2)


class LogitsReader(ABC):
    """The target, reading texts teacher-forced.

    Attributes:
        vocab_size: V, tokens that it scores.
    """

    vocab_size: int

    @abstractmethod
    def read(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int]
    ) -> Iterator[Iterator[torch.Tensor]]:
        """Yield for each text the logits that its last tokens were drawn from.

        They come in pieces [n, V], in order. A piece is used before the next one is asked for, and
        the next one may be written over it.

        Args:
            texts: token ids.
            begins: for each text the first token that is scored, at least 1: nothing predicts the
                token at 0.
        """


class ModelReader(LogitsReader):
    """A PyTorch model that reads one padded batch.

    Args:
        model: the target.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._head = model, head_of(model)
        self.vocab_size = int(self._head.weight.shape[0])

    def read(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int]
    ) -> Iterator[Iterator[torch.Tensor]]:
        import torch

        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, text in enumerate(texts):
            ids[number, : len(text)], mask[number, : len(text)] = torch.tensor(text), 1
        device = self._model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        hidden = last_hidden_states(self._model, self._model, inputs)
        for states, text, begin in zip(hidden, texts, begins, strict=True):
            # The token at t is predicted from the hidden state at t − 1.
            yield self._pieces(states[begin - 1 : len(text) - 1])

    def _pieces(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        size = _HEAD_TOKENS if states.device.type == "cpu" else _HEAD_TOKENS_GPU
        for start in range(0, len(states), size):
            yield self._head.logits(states[start : start + size])


def write_target_logits(
    target: PreTrainedModel | LogitsReader,
    rows: Sequence[dict[str, Any]],
    folder: Path,
    *,
    top_k: int,
    temperature: float,
    batch_tokens: int = 4096,
    rows_per_shard: int = 256,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Store the target's distribution for every completion token of ``rows``.

    Shard k holds rows [k·n, (k+1)·n) and is renamed into place when whole; a killed run goes on
    after the last one.

    Args:
        target: a PyTorch model, or whatever else reads as the target.
        rows: of `filters.read_kept_rows`, so that what training leaves out costs nothing.
        folder: where shards go; made if missing.
        top_k: how many tokens to keep.
        temperature: of the distribution.
        batch_tokens: longest batch, padding included.
        rows_per_shard: n.
        on_progress: called with the completion tokens done since the last call.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        return
    reader = target if isinstance(target, LogitsReader) else ModelReader(target)
    if top_k > reader.vocab_size:
        raise FastDraftError(f"top_k: {top_k} of a vocabulary of {reader.vocab_size}")
    start = time.monotonic()
    paths = []
    for number, first in enumerate(range(0, len(rows), rows_per_shard)):
        shard = rows[first : first + rows_per_shard]
        path = folder / f"part-{number:05d}.parquet"
        paths.append(path)
        if path.exists():
            on_progress(sum(len(row["completion_ids"]) for row in shard))
            continue
        # A row without a completion is in no batch and stores nothing.
        found = {row["index"]: _nothing(top_k) for row in shard}
        with torch.inference_mode():
            for batch in _batches(shard, batch_tokens):
                found |= _distributions(reader, batch, top_k, temperature)
                on_progress(sum(len(row["completion_ids"]) for row in batch))
        _write_shard(
            path, [(row["index"], *found[row["index"]]) for row in shard], reader.vocab_size
        )
    write_json(
        folder / MANIFEST,
        {
            "rows": len(rows),
            "tokens": sum(len(row["completion_ids"]) for row in rows),
            "top_k": top_k,
            "temperature": temperature,
            "vocab_size": reader.vocab_size,
            "seconds_of_last_run": round(time.monotonic() - start, 1),
            "shards": {path.name: sha256_file(path) for path in paths},
        },
    )


def _batches(rows: Sequence[dict[str, Any]], tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Group rows of similar length so that a batch, padded, has at most ``tokens`` tokens."""

    def length(row: dict[str, Any]) -> int:
        return len(row["prompt_ids"]) + len(row["completion_ids"])

    batch: list[dict[str, Any]] = []
    for row in sorted((r for r in rows if r["completion_ids"]), key=length):
        if batch and length(row) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _distributions(
    reader: LogitsReader, rows: Sequence[dict[str, Any]], k: int, temperature: float
) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return ids, log-probabilities and tails of the completions of a batch, by row index."""
    import torch

    texts = [[*row["prompt_ids"], *row["completion_ids"]] for row in rows]
    # Nothing predicts a first token.
    begins = [max(1, len(row["prompt_ids"])) for row in rows]
    found = {}
    for row, pieces in zip(rows, reader.read(texts, begins), strict=True):
        parts = [top_k_of(piece, k, temperature) for piece in pieces]
        if not parts:
            found[row["index"]] = _nothing(k)
            continue
        kept, log_probs, tail = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        found[row["index"]] = (kept, log_probs.astype(np.float16), tail.astype(np.float16))
    return found


def _nothing(k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a row stores that has no token with a past."""
    return np.zeros((0, k), np.int64), np.zeros((0, k), np.float16), np.zeros(0, np.float16)


def _write_shard(
    path: Path, rows: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]], vocab_size: int
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = smallest_id_type(vocab_size)

    def lists(values: Sequence[np.ndarray]) -> Any:
        flat = np.concatenate([value.reshape(-1) for value in values])
        offsets = np.cumsum([0, *(value.size for value in values)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))

    table = pa.table(
        {
            "index": pa.array([row[0] for row in rows], pa.int32()),
            "top_k_ids": lists([row[1].astype(kind) for row in rows]),
            "top_k_logprobs": lists([row[2] for row in rows]),
            "tail_logprob": lists([row[3] for row in rows]),
        }
    )
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)


class StoredLogits:
    """A finished set of stored distributions.

    Args:
        folder: what `write_target_logits` filled.

    Raises:
        FastDraftError: it is unfinished or damaged.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / MANIFEST
        if not path.exists():
            raise FastDraftError(f"{folder}: no finished distributions ({MANIFEST} is missing)")
        self.manifest = json.loads(path.read_text(encoding="utf-8"))
        tables = [pa.table({"index": pa.array([], pa.int32())})]  # of a set without rows
        for name, digest in self.manifest["shards"].items():
            if not (folder / name).exists() or sha256_file(folder / name) != digest:
                raise FastDraftError(
                    f"{folder / name}: missing or damaged; delete the set's folder and rerun"
                )
            tables.append(pq.read_table(folder / name))
        self._table = pa.concat_tables(tables[1:] or tables).combine_chunks()
        self._row = {index: i for i, index in enumerate(self._table["index"].to_pylist())}

    @property
    def top_k(self) -> int:
        return int(self.manifest["top_k"])

    @property
    def temperature(self) -> float:
        return float(self.manifest["temperature"])

    def of_row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids [n, k], log-probabilities [n, k] and tails [n] of a row's completion.

        Raises:
            FastDraftError: the row is not among them.
        """
        if index not in self._row:
            raise FastDraftError(f"row {index} has no stored distribution; run stage logits again")
        row = self._row[index]
        ids, log_probs, tail = (
            self._table[name][row].values.to_numpy(zero_copy_only=False)
            for name in ("top_k_ids", "top_k_logprobs", "tail_logprob")
        )
        return ids.reshape(-1, self.top_k), log_probs.reshape(-1, self.top_k), tail
