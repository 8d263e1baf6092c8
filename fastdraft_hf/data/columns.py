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

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

IDS = "target_top_k_ids"
LOG_PROBS = "target_top_k_logprobs"
TAIL = "target_tail_logprob"
TEMPERATURE = "target_temperature"
LISTS = (IDS, LOG_PROBS, TAIL)

IGNORED = -100  # label of a token without loss

# Numbers checked before training starts (a few seconds). The rest is checked batch by batch.
_SCANNED_NUMBERS = 50_000_000
_ROWS_AT_ONCE = 512
_STREAMED_ROWS = 64
_ROWS_A_CHUNK = 1000


def smallest_id_type(vocab_size: int) -> type[np.integer[Any]]:
    """Return the integer type that holds every id below ``vocab_size`` in the fewest bytes."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def distribution_table(
    rows: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]], temperature: float
) -> Any:
    """Return the columns as an arrow table.

    Args:
        rows: (length of the row, ids [n, k], log-probabilities [n, k], tails [n]). The n stored
            distributions belong to the last n tokens of the row.
        temperature: of the distributions.
    """
    import pyarrow as pa

    # Arrow's list offsets have 32 bits, so a long table is made of chunks.
    return pa.concat_tables(
        _table_chunk(rows[start : start + _ROWS_A_CHUNK], temperature)
        for start in range(0, len(rows), _ROWS_A_CHUNK)
    )


def _table_chunk(
    rows: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]], temperature: float
) -> Any:
    import pyarrow as pa

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
        ValueError: some of the columns are there and some are not.
    """
    columns = column_names(dataset)
    found = [column for column in LISTS if column in columns]
    if found and len(found) < len(LISTS):
        missing = ", ".join(column for column in LISTS if column not in columns)
        raise ValueError(
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
) -> int:
    """Check the stored distributions and return k.

    Of a dataset in memory or on disk, the first 50M numbers are checked. Of a streamed dataset,
    the rows up to the first one that holds a distribution.

    Args:
        dataset: has the columns of this module.
        vocab_size: rows of the draft's head.
        temperature: what the distributions must have been made with.
        name: of the dataset, for messages.

    Raises:
        ValueError: with the column, the row and the fault.
    """
    import datasets
    import pyarrow as pa

    if isinstance(dataset, datasets.Dataset):
        wanted = (*LISTS, TEMPERATURE, "input_ids", "labels")
        present = column_names(dataset)
        arrow = dataset.select_columns([c for c in wanted if c in present]).with_format("arrow")
        tables: Any = (
            (start, arrow[start : start + _ROWS_AT_ONCE])
            for start in range(0, len(dataset), _ROWS_AT_ONCE)
        )
    else:
        rows: list[dict[str, Any]] = []
        for row in itertools.islice(dataset, _STREAMED_ROWS):
            rows.append(row)
            if not isinstance(row.get(IDS), list) or any(row[IDS]):
                break
        if not rows:
            raise ValueError(f"{name} dataset: it has no rows")
        tables = [(0, pa.Table.from_pylist(rows))]
    k = seen = 0
    for start, table in tables:
        k = _check_rows(table, k, vocab_size, temperature, f"{name} dataset", start)
        seen += k * sum(len(row) for row in table[IDS])
        if seen > _SCANNED_NUMBERS:
            break
    if not k:
        raise ValueError(f"{name} dataset: {IDS} is empty in every row")
    return k


def _check_rows(
    table: Any, k: int, vocab_size: int, temperature: float, where: str, start: int
) -> int:
    """Check an arrow table whose first row has number ``start``. Return k."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def array(column: str) -> Any:
        found = table[column].combine_chunks()
        if not (pa.types.is_list(found.type) or pa.types.is_large_list(found.type)):
            raise ValueError(f"{where}: column {column} is {found.type}; every row needs a list")
        return found

    def lengths(lists: Any) -> np.ndarray:
        return np.asarray(pc.fill_null(pc.list_value_length(lists), 0), dtype=np.int64)

    if "input_ids" not in table.column_names:
        raise ValueError(
            f"{where}: {IDS} without input_ids. A stored distribution belongs to the token ids the "
            "target generated; text is not tokenized again"
        )
    made_at = table[TEMPERATURE].to_pylist() if TEMPERATURE in table.column_names else [1.0]
    for number, value in enumerate(made_at):
        if abs(float(value) - temperature) > 1e-6:
            raise ValueError(
                f"{where}, row {start + number}: {TEMPERATURE} is {float(value):g}, "
                f"temperature is {temperature:g}; run stage logits again or change temperature"
            )
    sizes = lengths(array("input_ids"))
    row_of = start + np.repeat(np.arange(len(sizes)), sizes)
    for column in LISTS:
        for number in np.flatnonzero(lengths(array(column)) != sizes)[:1]:
            raise ValueError(
                f"{where}, row {start + number}: {column} has {lengths(array(column))[number]} "
                f"entries for {sizes[number]} input_ids"
            )
    inner = {}
    for column in (IDS, LOG_PROBS):
        flat = array(column).flatten()
        if not (pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type)):
            raise ValueError(
                f"{where}: column {column} holds {flat.type}; every token needs a list"
            )
        inner[column] = flat
    counts = lengths(inner[IDS])
    for position in np.flatnonzero(counts != lengths(inner[LOG_PROBS]))[:1]:
        raise ValueError(
            f"{where}, row {row_of[position]}: {IDS} has {counts[position]} ids where "
            f"{LOG_PROBS} has {lengths(inner[LOG_PROBS])[position]}"
        )
    positions = np.flatnonzero(counts)
    k = k or (int(counts[positions[0]]) if len(positions) else 0)
    for position in positions[counts[positions] != k][:1]:
        raise ValueError(
            f"{where}, row {row_of[position]}: {IDS} has {counts[position]} ids for a token, "
            f"{k} before"
        )
    if "labels" in table.column_names:
        for number in np.flatnonzero(lengths(array("labels")) != sizes)[:1]:
            raise ValueError(
                f"{where}, row {start + number}: labels has {lengths(array('labels'))[number]} "
                f"entries for {sizes[number]} input_ids"
            )
        labelled = np.asarray(array("labels").flatten()) != IGNORED
        labelled[(np.cumsum(sizes) - sizes)[sizes > 0]] = False  # nothing predicts a first token
        for position in np.flatnonzero(labelled & (counts == 0))[:1]:
            raise ValueError(
                f"{where}, row {row_of[position]}: a labelled token has no stored distribution "
                f"({IDS} is empty)"
            )
    if not len(positions):
        return k
    ids = np.asarray(inner[IDS].flatten()).astype(np.int64).reshape(-1, k)
    log_probs = np.asarray(inner[LOG_PROBS].flatten()).astype(np.float32).reshape(-1, k)
    tail = np.asarray(array(TAIL).flatten()).astype(np.float32)[positions]
    check_entries(
        ids, log_probs, tail, vocab_size, lambda entry: f"{where}, row {row_of[positions[entry]]}"
    )
    return k


def stored(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the positions [m] with a stored distribution, their ids and log-probabilities [m, k].

    Raises:
        ValueError: entries of unequal lengths.
    """
    lengths = np.fromiter((len(entry) for entry in row[IDS]), np.int64, len(row[IDS]))
    positions = np.flatnonzero(lengths)
    others = np.fromiter((len(entry) for entry in row[LOG_PROBS]), np.int64, len(row[LOG_PROBS]))
    if len(positions) and ((lengths[positions] != lengths[positions[0]]).any()):
        raise ValueError(f"{IDS} has entries of {sorted(set(lengths[positions]))} ids")
    if len(lengths) != len(others) or (lengths != others).any():
        raise ValueError(f"{IDS} and {LOG_PROBS} have entries of different lengths")
    k = int(lengths[positions[0]]) if len(positions) else 0
    ids = np.fromiter(itertools.chain.from_iterable(row[IDS]), np.int64).reshape(-1, k or 1)
    log_probs = np.fromiter(itertools.chain.from_iterable(row[LOG_PROBS]), np.float32)
    return positions, ids[: len(positions)], log_probs.reshape(-1, k or 1)[: len(positions)]


def check_entries(
    ids: np.ndarray,
    log_probs: np.ndarray,
    tail: np.ndarray,
    vocab_size: int,
    where: Callable[[int], str],
) -> None:
    """Raise `ValueError` unless every entry is a distribution over ids of the vocabulary.

    Args:
        ids: [m, k].
        log_probs: [m, k].
        tail: [m].
        vocab_size: ids are below it.
        where: names the row of an entry, for messages.
    """
    for entry, column in np.argwhere((ids < 0) | (ids >= vocab_size))[:1]:
        raise ValueError(
            f"{where(entry)}: {IDS} holds {ids[entry, column]}, the vocabulary has {vocab_size} ids"
        )
    ordered = np.sort(ids, 1)
    for entry in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1))[:1]:
        raise ValueError(f"{where(entry)}: {IDS} holds an id twice in one entry")
    mass = np.exp(log_probs).sum(1) + np.exp(tail)
    # float16 rounds each of them; anything further off is not a distribution.
    for entry in np.flatnonzero(~(np.abs(mass - 1) < 0.02))[:1]:
        raise ValueError(
            f"{where(entry)}: exp of {LOG_PROBS} and {TAIL} sums to {mass[entry]:.3g}, not to 1; "
            "natural logarithms of probabilities are needed"
        )


def check_covered(labels: Any, positions: np.ndarray, where: str) -> None:
    """Raise `ValueError` if a labelled token other than the first has no stored distribution."""
    if labels is None:
        return
    labelled = np.flatnonzero(np.asarray(labels) != IGNORED)
    missing = np.setdiff1d(labelled[labelled > 0], positions)
    if len(missing):
        raise ValueError(
            f"{where}: token {missing[0]} is labelled and has no stored distribution "
            f"({IDS} is empty)"
        )
