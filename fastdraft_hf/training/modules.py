"""What the trainer asks of a parameter that is cut up, and of a batch: which rows it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Partial


def whole_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return a parameter in one piece, also when FSDP2 has cut it up.

    FSDP2 gathers parameters while their module runs and cuts them up again after it; the head is
    used outside of it. Each process has the gradient of its own tokens, and FSDP averages: so the
    gradients are summed over processes on the way back and divided by their number.
    """
    if not isinstance(weight, DTensor):
        return weight
    whole = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    processes = weight.device_mesh.size()
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / processes)  # type: ignore[no-untyped-call]
    return whole


def rows_of_batch(dataset: Any, batches: Sequence[dict[str, Any]]) -> str:
    """Say which rows of a data set some batches hold, by looking for their ids.

    It is done once, when training fails, so that nothing has to be carried through the data
    pipeline for it. Rows may have been cut, split or packed since. What cannot be looked through
    (a streamed data set, text) has the first ids shown instead.

    Args:
        dataset: as it was given to the trainer, or None.
        batches: the inputs of the model.
    """
    documents = [ids for inputs in batches for ids in _documents(inputs)]
    documents = [ids for ids in documents if len(ids) > 1] or documents
    if hasattr(dataset, "__len__") and "input_ids" in dataset.column_names:
        whole: dict[bytes, set[int]] = {}
        parts: dict[bytes, set[int]] = {}
        wanted = {_bytes(ids) for ids in documents}
        for number, row in enumerate(dataset.select_columns(["input_ids"])):
            ids = _bytes(row["input_ids"])
            if ids in wanted:
                whole.setdefault(ids, set()).add(number)
                continue
            for document in wanted:
                if _inside(document, ids) or _inside(ids, document):
                    parts.setdefault(document, set()).add(number)
        found = set().union(*(whole.get(ids) or parts.get(ids, set()) for ids in wanted))
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
    """Return whether ids stand in a row in others; a match must begin where an id does."""
    at = whole.find(part) if part else -1
    while at >= 0 and at % 4:
        at = whole.find(part, at + 1)
    return at >= 0
