"""What the trainer asks of a parameter that is cut up, and of a batch: which rows it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def keep_head_whole(model: Any) -> None:
    """Have FSDP2 leave the head in one piece between the forward pass and the backward pass.

    FSDP2 gathers parameters while their module runs, cuts them up again after it and gathers them
    once more when a gradient by the module's output arrives. The loss uses the head after the
    forward pass and never the logits that came out of it, so nothing would gather it again, and
    the backward pass would read freed memory. Kept whole, its gradient goes the same way as every
    other one's. The memory is that of the tables, which the loss needs whole anyway. What
    accelerate prepares since 1.15 is so already.

    Args:
        model: the unwrapped draft, cut up by FSDP2 or not.
    """
    for module in (model, model.get_output_embeddings()):
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)


def check_whole(weight: torch.Tensor) -> torch.Tensor:
    """Return the head's weight.

    Raises:
        ValueError: it is cut up all the same (tensor parallelism, say).
    """
    if isinstance(weight, DTensor):
        raise ValueError(
            "the draft's head is cut up over devices where the loss needs it whole; use data "
            "parallelism or FSDP2"
        )
    return weight


def rows_of_batch(dataset: Any, batches: Sequence[dict[str, Any]]) -> str:
    """Say which rows of a dataset some batches hold, by looking for their ids.

    It is done once, when training fails, so that nothing has to be carried through the data
    pipeline for it. Rows may have been cut, split or packed since. What cannot be looked through
    (a streamed dataset, text) has the first ids shown instead.

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
