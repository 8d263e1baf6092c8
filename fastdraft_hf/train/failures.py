"""The error for a loss or a gradient that is NaN or infinite, and the rows that caused it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastdraft_hf._errors import FastDraftError


class NonFiniteLossError(FastDraftError):
    """The loss or its gradient is NaN or infinite; the weights were not touched."""


def rows_of(dataset: Any, batches: list[dict[str, Any]]) -> str:
    """Name the rows of ``dataset`` that some batches hold.

    Rows are found by their ids, so that the data pipeline need not carry row numbers; they may have
    been cut, split or packed. For a stream or text the first ids are shown instead.
    """
    held = [_text(ids) for inputs in batches for ids in _sequences(inputs) if len(ids) > 1]
    if hasattr(dataset, "__len__") and "input_ids" in dataset.column_names:
        rows = (_text(row["input_ids"]) for row in dataset.select_columns(["input_ids"]))
        found = [n for n, row in enumerate(rows) if any(one in row or row in one for one in held)]
        if found:
            listed = ", ".join(map(str, found))
            return f"row{'s' if len(found) > 1 else ''} {listed} of train_dataset"
    shown = "; ".join(", ".join(one.split()[:8]) for one in held[:4])
    return f"the rows that begin with the ids {shown}"


def _sequences(inputs: dict[str, Any]) -> Iterator[list[int]]:
    """Yield the sequences of a batch, padded or flattened."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if "cu_seq_lens_q" in inputs:
        ids = ids[0].tensor_split(inputs["cu_seq_lens_q"][1:-1].tolist())
    for number, row in enumerate(ids):
        yield (row if mask is None else row[mask[number].bool()]).tolist()


def _text(ids: Sequence[int]) -> str:
    return f" {' '.join(map(str, ids))} "
