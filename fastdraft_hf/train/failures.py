"""The error for a loss or a gradient that is NaN or infinite, with the rows that caused it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.train.callbacks import newest_complete
from fastdraft_hf.train.config import DraftDistillationConfig


class NonFiniteLossError(FastDraftError):
    """The loss or its gradient is NaN or infinite; the weights were not touched."""

    @classmethod
    def of(
        cls,
        what: str,
        args: DraftDistillationConfig,
        step: int,
        rows: Any,
        batches: list[dict[str, Any]],
    ) -> NonFiniteLossError:
        """Return the error, naming the step, the rows and the last good checkpoint.

        ``step`` counts finished steps, ``rows`` is the dataset as it was given to the trainer
        (``None`` in an evaluation), and ``batches`` are inputs of the model.
        """
        where = f"evaluation after step {step}" if rows is None else f"step {step + 1}"
        good = newest_complete(Path(str(args.output_dir)), step)
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        rates = f"learning_rate {args.learning_rate:g}"
        if args.use_muon:
            rates += f", muon_learning_rate {args.muon_learning_rate:g}"
        return cls(
            f"{where}: {what} on {_rows_of(rows, batches)}; {kept}. Look at these rows, or "
            f"lower the learning rate ({rates})"
        )


def _rows_of(dataset: Any, batches: list[dict[str, Any]]) -> str:
    """Name the rows that some batches hold.

    Rows are found by their ids, so that the data pipeline need not carry row numbers; they may have
    been cut, split or packed. For a stream or text the first ids are shown instead.
    """
    documents = [ids for inputs in batches for ids in _documents(inputs)]
    documents = [ids for ids in documents if len(ids) > 1] or documents
    if hasattr(dataset, "__len__") and "input_ids" in dataset.column_names:
        equal: dict[bytes, set[int]] = {}
        parts: dict[bytes, set[int]] = {}
        wanted = {_bytes(ids) for ids in documents}
        for number, row in enumerate(dataset.select_columns(["input_ids"])):
            ids = _bytes(row["input_ids"])
            if ids in wanted:
                equal.setdefault(ids, set()).add(number)
                continue
            for document in wanted:
                if _inside(document, ids) or _inside(ids, document):
                    parts.setdefault(document, set()).add(number)
        found = set().union(*(equal.get(ids) or parts.get(ids, set()) for ids in wanted))
        if found:
            listed = ", ".join(map(str, sorted(found)))
            return f"row{'s' if len(found) > 1 else ''} {listed} of train_dataset"
    shown = "; ".join(", ".join(map(str, ids[:8])) for ids in documents[:4])
    return f"the rows that begin with the ids {shown}"


def _documents(inputs: dict[str, Any]) -> list[list[int]]:
    """Return the sequences of a batch, padded or flattened."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is not None:
        return [row[mask[number].bool()].tolist() for number, row in enumerate(ids)]
    if "cu_seq_lens_q" in inputs:
        ends = inputs["cu_seq_lens_q"][1:-1].tolist()
        return [part.tolist() for part in ids[0].tensor_split(ends)]
    return [row.tolist() for row in ids]


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype=np.int32).tobytes()


def _inside(part: bytes, whole: bytes) -> bool:
    """Return whether ``part`` occurs in ``whole``, at a whole id."""
    at = whole.find(part) if part else -1
    while at >= 0 and at % 4:
        at = whole.find(part, at + 1)
    return at >= 0
