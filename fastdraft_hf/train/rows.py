"""Sampling rows, cutting them to ``max_length`` and collating them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastdraft_hf.data import columns


@dataclass
class DraftCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which also cuts rows and collates a stored distribution.

    Adds to TRL's output for a batch of shape [B, T] ([1, T] when flattened) ``target_top_k_ids``
    [B, T, k] int64, ``target_top_k_logprobs`` [B, T, k] float16 and ``target_tail_logprob`` [B, T]
    float16, zeros where nothing is stored. The label of a row's first token is -100: nothing
    predicts it, and `Trainer` divides the loss by the number of labels.

    Args:
        vocab_size: rows of the draft's head, to check the ids against.
        max_length: rows are cut to this many tokens, all columns alike.
        keep_end: cut the beginning of a row instead of its end.

    Raises:
        FastDraftError: a row's columns are not distributions of its tokens.
    """

    vocab_size: int = 0
    max_length: int | None = None
    keep_end: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [self._cut(example) for example in examples]
        output: dict[str, Any] = super().torch_call(examples)
        output["labels"][:, 0] = -100
        if columns.IDS not in examples[0]:
            return output
        rows, length = output["input_ids"].shape
        arrays: dict[str, torch.Tensor] = {}
        start = k = 0
        for number, example in enumerate(examples):
            where = f"row {number} of a batch"
            positions, ids, log_probs, tail = columns.checked(example, k, self.vocab_size, where)
            if len(positions):
                k = ids.shape[1]
                arrays = arrays or _zeros(rows, length, k)
                row, at = (0, start) if self.padding_free else (number, 0)
                where_to = torch.from_numpy(positions + at)
                arrays[columns.IDS][row, where_to] = torch.from_numpy(ids)
                arrays[columns.LOG_PROBS][row, where_to] = torch.from_numpy(log_probs).half()
                arrays[columns.TAIL][row, where_to] = torch.from_numpy(tail).half()
            start += len(example["input_ids"])
        return {**output, **(arrays or _zeros(rows, length, 1))}

    def _cut(self, example: dict[str, Any]) -> dict[str, Any]:
        size = len(example["input_ids"])
        if columns.IDS in example:
            columns.check_lists(example, "a row")
        if not self.max_length or size <= self.max_length:
            return example
        window = slice(size - self.max_length, None) if self.keep_end else slice(self.max_length)
        lists = ("input_ids", "labels", *columns.LISTS)
        return {name: one[window] if name in lists else one for name, one in example.items()}


def _zeros(rows: int, length: int, k: int) -> dict[str, torch.Tensor]:
    return {
        columns.IDS: torch.zeros(rows, length, k, dtype=torch.int64),
        columns.LOG_PROBS: torch.zeros(rows, length, k, dtype=torch.float16),
        columns.TAIL: torch.zeros(rows, length, dtype=torch.float16),
    }


class SameLengthSampler(LengthGroupedSampler):
    """transformers' sampler of rows of similar length, the same for any number of processes.

    The order follows from the seed and the epoch, so that a resumed epoch repeats it.
    """

    def __init__(self, sampler: LengthGroupedSampler, processes: int, seed: int) -> None:
        self.batch_size, self.lengths = sampler.batch_size * processes, sampler.lengths
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self._seed + epoch)
