"""Columns of the target's distribution, as stage logits writes and the trainer reads them.

Every list is as long as the row's ``input_ids``, so packing, splitting and truncating treat all
columns alike. Entry t is the distribution of token t given the tokens before it. It is empty where
no loss is taken (prompts) and at t = 0.

| column | entry t |
|---|---|
| ``target_top_k_ids`` | k ids, in the smallest integer type that holds the vocabulary |
| ``target_top_k_logprobs`` | k natural logarithms, float16, at ``target_temperature`` |
| ``target_tail_logprob`` | logarithm of the tail's mass, float16; 0 where the others are empty |
| ``target_temperature`` | one number per row; 1 if the column is missing |
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from fastdraft_hf._errors import FastDraftError

IDS = "target_top_k_ids"
LOG_PROBS = "target_top_k_logprobs"
TAIL = "target_tail_logprob"
TEMPERATURE = "target_temperature"
LISTS = (IDS, LOG_PROBS, TAIL)

IGNORED = -100  # label of a token without loss

# Rows checked before training starts.
_CHECKED_ROWS = 100


def smallest_id_type(vocab_size: int) -> type[np.integer[Any]]:
    """Return the integer type that holds every id below ``vocab_size`` in the fewest bytes."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def token_table(
    index: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> pa.Table:
    """Return rows with ``index``, ``input_ids`` and ``labels``, which are -100 on prompts."""
    pairs, kind = list(zip(prompts, completions, strict=True)), pa.list_(pa.int32())
    labels = [[IGNORED] * len(prompt) + ids for prompt, ids in pairs]
    texts = pa.array([prompt + ids for prompt, ids in pairs], kind)
    return pa.table({"index": index, "input_ids": texts, "labels": pa.array(labels, kind)})


def distribution_table(
    rows: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]], temperature: float
) -> pa.Table:
    """Return the columns as an arrow table.

    Args:
        rows: (length of the row, ids [n, k], log-probabilities [n, k], tails [n]). The n stored
            distributions belong to the last n tokens of the row.
        temperature: of the distributions.
    """
    k = rows[0][1].shape[1]
    lengths = np.array([row[0] for row in rows])
    counts = np.zeros(int(lengths.sum()), dtype=np.int64)
    tail = np.zeros(len(counts), dtype=np.float16)
    for end, (_, ids, _, rest) in zip(np.cumsum(lengths), rows, strict=True):
        counts[end - len(ids) : end] = k
        tail[end - len(ids) : end] = rest
    inner = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    outer = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())

    def nested(values: Sequence[np.ndarray]) -> Any:
        flat = pa.array(np.concatenate([value.reshape(-1) for value in values]))
        return pa.ListArray.from_arrays(outer, pa.ListArray.from_arrays(inner, flat))

    return pa.table(
        {
            IDS: nested([row[1] for row in rows]),
            LOG_PROBS: nested([row[2] for row in rows]),
            TAIL: pa.ListArray.from_arrays(outer, pa.array(tail)),
            TEMPERATURE: pa.array(np.full(len(rows), temperature, dtype=np.float32)),
        }
    )


def has_distribution(dataset: Dataset | IterableDataset, name: str = "train") -> bool:
    """Return whether a dataset stores the target's distribution.

    Raises:
        FastDraftError: some of the columns are there and some are not.
    """
    columns = column_names(dataset)
    found = [column for column in LISTS if column in columns]
    if found and len(found) < len(LISTS):
        missing = ", ".join(column for column in LISTS if column not in columns)
        raise FastDraftError(
            f"{name} dataset: it has {', '.join(found)} but not {missing}; a stored distribution "
            f"needs all of {', '.join(LISTS)}"
        )
    return bool(found)


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the column names. For a streamed dataset without them, read the first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def check_distribution(
    dataset: Dataset | IterableDataset, *, vocab_size: int, temperature: float, name: str = "train"
) -> None:
    """Check the stored distributions of the first rows; the collator checks the rows after them.

    Raises:
        FastDraftError: with the column, the row and the fault.
    """
    k = 0
    for number, row in enumerate(itertools.islice(dataset, _CHECKED_ROWS)):
        where = f"{name} dataset, row {number}"
        check_lists(row, where)
        made_at = float(row.get(TEMPERATURE) or 1.0)
        if abs(made_at - temperature) > 1e-6:
            raise FastDraftError(
                f"{where}: {TEMPERATURE} is {made_at:g}, temperature is {temperature:g}; run stage "
                "logits again or change temperature"
            )
        positions, ids, *_ = checked(row, k, vocab_size, where)
        k = ids.shape[1] if len(positions) else k
    if not k:
        raise FastDraftError(f"{name} dataset: it has an empty {IDS} in every row")


def check_lists(row: dict[str, Any], where: str) -> None:
    """Raise `FastDraftError` unless the columns are lists as long as ``input_ids``."""
    if "input_ids" not in row:
        raise FastDraftError(
            f"{where}: {IDS} without input_ids. A stored distribution belongs to the token ids the "
            "target generated; text is not tokenized again"
        )
    size = len(row["input_ids"])
    for column in LISTS if row.get("labels") is None else (*LISTS, "labels"):
        values = row.get(column)
        if not isinstance(values, list):
            raise FastDraftError(f"{where}: {column} is {type(values).__name__}; it must be a list")
        if len(values) != size:
            raise FastDraftError(
                f"{where}: {column} has {len(values)} entries for {size} input_ids"
            )
        if column in (IDS, LOG_PROBS) and not all(isinstance(entry, list) for entry in values):
            raise FastDraftError(f"{where}: {column} must have a list for every token")


def stored(row: dict[str, Any], where: str = "a row") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the positions [m] with a distribution, their ids and log-probabilities [m, k]."""
    lengths, others = (np.array([*map(len, row[name])], np.int64) for name in (IDS, LOG_PROBS))
    if not np.array_equal(lengths, others):
        raise FastDraftError(f"{where}: {IDS} and {LOG_PROBS} have entries of different lengths")
    positions = np.flatnonzero(lengths)
    counts = sorted(set(lengths[positions].tolist()))
    if len(counts) > 1:
        raise FastDraftError(f"{where}: {IDS} has entries of {counts} ids")
    k = counts[0] if counts else 1
    ids = np.fromiter(itertools.chain.from_iterable(row[IDS]), np.int64)
    log_probs = np.fromiter(itertools.chain.from_iterable(row[LOG_PROBS]), np.float32)
    return positions, ids.reshape(-1, k), log_probs.reshape(-1, k)


def checked(
    row: dict[str, Any], k: int, vocab_size: int, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return `stored` and the tails [m], if every labelled token has a distribution over k ids.

    ``seq_lengths`` of the row are those of the sequences packed in it. ``k`` is that of the rows
    before, 0 for the first.

    Raises:
        FastDraftError: with the column and the fault.
    """
    positions, ids, log_probs = stored(row, where)
    if row.get("labels") is not None:
        labelled = np.flatnonzero(np.asarray(row["labels"]) != IGNORED)
        # Nothing predicts the first token of a sequence.
        starts = np.cumsum([0, *row.get("seq_lengths", ())])
        missing = np.setdiff1d(labelled, np.union1d(positions, starts))
        if len(missing):
            raise FastDraftError(
                f"{where}: token {missing[0]} is labelled and has no stored distribution "
                f"({IDS} is empty)"
            )
    tail = np.asarray(row[TAIL], dtype=np.float32)[positions]
    if not len(positions):
        return positions, ids, log_probs, tail
    if k and k != ids.shape[1]:
        raise FastDraftError(f"{where}: {IDS} has {ids.shape[1]} ids for a token, {k} before")
    for outside in ids[(ids < 0) | (ids >= vocab_size)][:1]:
        raise FastDraftError(f"{where}: {IDS} holds {outside}, the vocabulary has {vocab_size} ids")
    ordered = np.sort(ids, 1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise FastDraftError(f"{where}: {IDS} holds an id twice in one entry")
    mass = np.exp(log_probs).sum(1) + np.exp(tail)
    # float16 rounds each of them; anything further off is not a distribution.
    for wrong in mass[~(np.abs(mass - 1) < 0.02)][:1]:
        raise FastDraftError(
            f"{where}: exp of {LOG_PROBS} and {TAIL} sums to {wrong:.3g}, not to 1; natural "
            "logarithms of probabilities are needed"
        )
    return positions, ids, log_probs, tail
