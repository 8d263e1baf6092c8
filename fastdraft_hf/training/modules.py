"""What the trainer asks of a parameter that is cut up, and of a batch: which rows it holds."""

from __future__ import annotations

from typing import Any

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


def rows_of_batch(dataset: Any, inputs: dict[str, Any]) -> str:
    """Say which rows of a data set a batch holds, by looking for their ids.

    It is done once, when training fails, so that nothing has to be carried through the data
    pipeline for it. A streamed data set cannot be looked through; the first ids are shown then.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    sequences = [row if mask is None else row[mask[i].bool()] for i, row in enumerate(ids)]
    wanted = [sequence.tolist() for sequence in sequences]
    if mask is None and "cu_seq_lens_q" in inputs:  # flattened: rows may be several sequences
        wanted = [ids[0].tolist()]
    if hasattr(dataset, "__len__"):
        flat = [token for sequence in wanted for token in sequence]
        found = [
            number
            for number, row in enumerate(dataset.select_columns(["input_ids"]))
            if _holds(flat, wanted, row["input_ids"])
        ]
        if found:
            return (
                f"row{'s' if len(found) > 1 else ''} {', '.join(map(str, found))} of train_dataset"
            )
    shown = "; ".join(", ".join(map(str, sequence[:8])) for sequence in wanted[:4])
    return f"the rows that begin with the ids {shown}"


def _holds(flat: list[int], wanted: list[list[int]], row: list[int]) -> bool:
    if row in wanted:
        return True
    if len(wanted) != 1 or len(row) >= len(flat) or not row:
        return False
    return any(
        flat[start : start + len(row)] == row
        for start, token in enumerate(flat[: len(flat) - len(row) + 1])
        if token == row[0]
    )
