"""Batches with the target's stored distribution beside the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastdraft_hf.data import columns


@dataclass
class DraftCollator(DataCollatorForLanguageModeling):
    """TRL's collator, and the stored top-k if there is one.

    Adds, to what TRL's gives for a batch of shape [B, T] ([1, T] when flattened):

    - ``target_top_k_ids`` [B, T, k] int64, ``target_top_k_logprobs`` [B, T, k] float16 and
      ``target_tail_logprob`` [B, T] float16, zeros where nothing is stored;
    - labels of every sequence's first token are -100: nothing predicts it, and `Trainer` counts
      the labels to divide the loss by.

    Args:
        stored: whether rows carry the columns.
        vocab_size: rows of the draft's head, to check the ids against.
        keep_end: whether rows that were cut to max_length lost their beginning.

    Raises:
        ValueError: what a row stores is no distribution of its tokens.
    """

    stored: bool = False
    vocab_size: int = 0
    keep_end: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super().torch_call(examples)
        output["labels"][:, 0] = -100
        if not self.stored:
            return output
        rows, length = output["input_ids"].shape
        arrays: dict[str, torch.Tensor] = {}
        start = k = 0
        for number, example in enumerate(examples):
            size = len(example["input_ids"])
            where = f"row {number} of a batch"
            # TRL cuts a row's ids to max_length; the columns beside them are cut here.
            cut = {column: self._cut(example[column], size, column) for column in columns.LISTS}
            positions, ids, log_probs = columns.stored(cut, where)
            columns.check_covered(example.get("labels"), _with_starts(positions, example), where)
            if len(positions):
                if k and k != ids.shape[1]:
                    raise ValueError(
                        f"{where}: {columns.IDS} has {ids.shape[1]} ids for a token, {k} before"
                    )
                k = ids.shape[1]
                arrays = arrays or _zeros(rows, length, k)
                tail = np.asarray(cut[columns.TAIL], dtype=np.float32)[positions]
                columns.check_entries(ids, log_probs, tail, self.vocab_size, where)
                row, at = (0, start) if self.padding_free else (number, 0)
                places = torch.from_numpy(positions + at)
                arrays[columns.IDS][row, places] = torch.from_numpy(ids)
                arrays[columns.LOG_PROBS][row, places] = torch.from_numpy(log_probs).half()
                arrays[columns.TAIL][row, places] = torch.from_numpy(tail).half()
            start += size
        return {**output, **(arrays or _zeros(rows, length, 1))}

    def _cut(self, entries: list[Any], size: int, column: str) -> list[Any]:
        """Return what of a column belongs to the ``size`` tokens that are left of a row."""
        if len(entries) < size:
            raise ValueError(f"{column} has {len(entries)} entries for {size} input_ids")
        return entries[len(entries) - size :] if self.keep_end else entries[:size]


def _zeros(rows: int, length: int, k: int) -> dict[str, torch.Tensor]:
    return {
        columns.IDS: torch.zeros(rows, length, k, dtype=torch.int64),
        columns.LOG_PROBS: torch.zeros(rows, length, k, dtype=torch.float16),
        columns.TAIL: torch.zeros(rows, length, dtype=torch.float16),
    }


def _with_starts(positions: np.ndarray, example: dict[str, Any]) -> np.ndarray:
    """Add the first tokens of packed sequences, which nothing predicts, to ``positions``."""
    if "seq_lengths" not in example:
        return positions
    starts = np.cumsum([0, *example["seq_lengths"]])[:-1]
    return np.union1d(positions, starts)
