"""The columns that store the target's distribution, and the check of what is in them.

Every list is as long as the row's ``input_ids``, so that packing, splitting and truncating treat
all columns alike; entry t is the distribution that token t was drawn from, given the tokens before
it, and is empty where no loss is taken (prompts) and at t = 0.

| column | an entry |
|---|---|
| ``target_top_k_ids`` | k ids, in the smallest integer type that holds the vocabulary |
| ``target_top_k_logprobs`` | k natural logarithms, float16, at ``target_temperature`` |
| ``target_tail_logprob`` | logarithm of the rest's mass, float16; 0 where the others are empty |
| ``target_temperature`` | one number a row; absent means 1 |
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

# Stored numbers that are looked at before training starts (a few seconds); what lies beyond is
# looked at batch by batch when it is read.
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
    """Return the columns, as an arrow table, for rows that begin with a prompt.

    Args:
        rows: (length of the row, ids [n, k], log-probabilities [n, k], tails [n]); the n stored
            tokens are the last ones of the row.
        temperature: of the distributions.
    """
    import pyarrow as pa

    # Arrow's lists count in 32 bits, so a table is made of chunks.
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
    """Return the columns, of a streamed dataset from its first row if it does not say them."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def check_distribution(
    dataset: Dataset | IterableDataset, *, vocab_size: int, temperature: float, name: str = "train"
) -> int:
    """Check what is stored and return k.

    A dataset in memory or on disk is read through (up to some 50M numbers), a streamed one's
    first row that stores anything is looked at.

    Args:
        dataset: with the columns of this module.
        vocab_size: rows of the draft's head.
        temperature: the one the stored distributions must have been made at.
        name: of the dataset, for messages.

    Raises:
        ValueError: naming the column, the row and what is wrong.
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
            raise ValueError(f"{name} dataset: it gives no row")
        tables = [(0, pa.Table.from_pylist(rows))]
    k = seen = 0
    for start, table in tables:
        k = _check_rows(table, k, vocab_size, temperature, f"{name} dataset", start)
        seen += k * sum(len(row) for row in table[IDS])
        if seen > _SCANNED_NUMBERS:
            break
    if not k:
        raise ValueError(f"{name} dataset: {IDS} is empty everywhere; nothing was stored")
    return k


def _check_rows(
    table: Any, k: int, vocab_size: int, temperature: float, where: str, start: int
) -> int:
    """Check an arrow table whose first row is number ``start``; return k."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def array(column: str) -> Any:
        found = table[column].combine_chunks()
        if not (pa.types.is_list(found.type) or pa.types.is_large_list(found.type)):
            raise ValueError(f"{where}: column {column} is {found.type}, a list a row is needed")
        return found

    def lengths(lists: Any) -> np.ndarray:
        return np.asarray(pc.fill_null(pc.list_value_length(lists), 0), dtype=np.int64)

    if "input_ids" not in table.column_names:
        raise ValueError(
            f"{where}: {IDS} without input_ids; a stored distribution belongs to the token ids the "
            "target emitted, text is not tokenised again"
        )
    made_at = table[TEMPERATURE].to_pylist() if TEMPERATURE in table.column_names else [1.0]
    for number, value in enumerate(made_at):
        if abs(float(value) - temperature) > 1e-6:
            raise ValueError(
                f"{where}, row {start + number}: {TEMPERATURE} is {float(value):g}, "
                f"temperature {temperature:g}; store the distributions again, or "
                "change the setting"
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
                f"{where}: column {column} holds {flat.type}, a list a token is needed"
            )
        inner[column] = flat
    counts = lengths(inner[IDS])
    for place in np.flatnonzero(counts != lengths(inner[LOG_PROBS]))[:1]:
        raise ValueError(
            f"{where}, row {row_of[place]}: {IDS} has {counts[place]} ids where {LOG_PROBS} has "
            f"{lengths(inner[LOG_PROBS])[place]}"
        )
    positions = np.flatnonzero(counts)
    k = k or (int(counts[positions[0]]) if len(positions) else 0)
    for place in positions[counts[positions] != k][:1]:
        raise ValueError(
            f"{where}, row {row_of[place]}: {IDS} has {counts[place]} ids for a token, {k} before"
        )
    if "labels" in table.column_names:
        for number in np.flatnonzero(lengths(array("labels")) != sizes)[:1]:
            raise ValueError(
                f"{where}, row {start + number}: labels has {lengths(array('labels'))[number]} "
                f"entries for {sizes[number]} input_ids"
            )
        labelled = np.asarray(array("labels").flatten()) != -100
        labelled[(np.cumsum(sizes) - sizes)[sizes > 0]] = False  # nothing predicts a first token
        for place in np.flatnonzero(labelled & (counts == 0))[:1]:
            raise ValueError(
                f"{where}, row {row_of[place]}: a token carries loss and stores no distribution "
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
    """Return the positions [m] that store something, their ids [m, k] and log-probabilities.

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
        where: says where an entry stands, for messages.
    """
    for entry, place in np.argwhere((ids < 0) | (ids >= vocab_size))[:1]:
        raise ValueError(
            f"{where(entry)}: {IDS} holds {ids[entry, place]}, the vocabulary has {vocab_size} ids"
        )
    ordered = np.sort(ids, 1)
    for entry in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1))[:1]:
        raise ValueError(f"{where(entry)}: {IDS} holds an id twice in one entry")
    mass = np.exp(log_probs).sum(1) + np.exp(tail)
    # float16 rounds each of them; anything further off is no distribution.
    for entry in np.flatnonzero(~(np.abs(mass - 1) < 0.02))[:1]:
        raise ValueError(
            f"{where(entry)}: exp of {LOG_PROBS} and {TAIL} sums to {mass[entry]:.3g}, not to 1; "
            "natural logarithms of probabilities are needed"
        )


def check_covered(labels: Any, positions: np.ndarray, where: str) -> None:
    """Raise `ValueError` when a labelled token (the first aside) stores no distribution."""
    if labels is None:
        return
    labelled = np.flatnonzero(np.asarray(labels) != -100)
    missing = np.setdiff1d(labelled[labelled > 0], positions)
    if len(missing):
        raise ValueError(
            f"{where}: token {missing[0]} carries loss and stores no distribution ({IDS} is empty)"
        )
