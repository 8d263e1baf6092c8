"""Batches with the target's stored distribution beside the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastdraft_hf.data import stored_distribution as columns


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
    """

    stored: bool = False
    vocab_size: int = 0

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super().torch_call(examples)
        output["labels"][:, 0] = -100
        if not self.stored:
            return output
        rows, length = output["input_ids"].shape
        arrays: dict[str, torch.Tensor] = {}
        start = 0
        for number, example in enumerate(examples):
            size = len(example["input_ids"])
            # A row that was cut to max_length keeps the columns' ends; they have no token any more.
            cut = {column: example[column][:size] for column in columns.LISTS}
            positions, ids, log_probs = columns.stored(cut)
            columns.check_ids(ids[: len(positions)], self.vocab_size, "a batch")
            columns.check_covered(
                example.get("labels"), _with_starts(positions, example), "a batch"
            )
            if not arrays:
                arrays = _zeros(rows, length, ids.shape[1])
            row, at = (0, start) if self.padding_free else (number, 0)
            places = torch.from_numpy(positions + at)
            if len(positions):
                arrays[columns.IDS] = _widen(arrays[columns.IDS], ids.shape[1])
                arrays[columns.LOG_PROBS] = _widen(arrays[columns.LOG_PROBS], ids.shape[1])
                arrays[columns.IDS][row, places] = torch.from_numpy(ids)
                arrays[columns.LOG_PROBS][row, places] = torch.from_numpy(log_probs).half()
                tail = np.asarray(cut[columns.TAIL], dtype=np.float32)[positions]
                arrays[columns.TAIL][row, places] = torch.from_numpy(tail).half()
            start += size
        return {**output, **arrays}


def _zeros(rows: int, length: int, k: int) -> dict[str, torch.Tensor]:
    return {
        columns.IDS: torch.zeros(rows, length, k, dtype=torch.int64),
        columns.LOG_PROBS: torch.zeros(rows, length, k, dtype=torch.float16),
        columns.TAIL: torch.zeros(rows, length, dtype=torch.float16),
    }


def _widen(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return ``values`` with k entries: a row without any stored told nothing about k."""
    return values if values.shape[-1] == k else values.new_zeros(*values.shape[:-1], k)


def _with_starts(positions: np.ndarray, example: dict[str, Any]) -> np.ndarray:
    """Add the first tokens of packed sequences, which nothing predicts, to ``positions``."""
    if "seq_lengths" not in example:
        return positions
    starts = np.cumsum([0, *example["seq_lengths"]])[:-1]
    return np.union1d(positions, starts)
