"""Parquet parts: rows written by several processes into one folder, with resume.

Each process writes files of its own, ``part-<rank>-<number>.parquet``. A part appears under its
name when it is complete and is replaced by a longer one until it is full, so a kill loses at most
the rows of the last `FLUSH_SECONDS`. Every row has an ``index``. What is missing is the indices
wanted less those in parts, whoever wrote them. So a run may resume with any number of processes.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdraft_hf._atomic import atomic_file
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import rank

if TYPE_CHECKING:
    import pyarrow as pa

PARTS = "part-*.parquet"
ROWS_PER_PART = 1024
# A part that is not full is written this often.
FLUSH_SECONDS = 30.0

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class PartWriter:
    """Write this process's parts of an existing folder. Leaving the context writes what is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        numbers = [int(path.stem[-5:]) for path in folder.glob(f"part-{rank():05d}-*.parquet")]
        self._number = max(numbers, default=-1) + 1
        self._tables: list[pa.Table] = []
        self._unsaved = 0
        self._saved_at = time.monotonic()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def add(self, table: pa.Table) -> None:
        """Add rows; write the part when it is full or was last written long ago."""
        self._tables.append(table)
        self._unsaved += len(table)
        full = sum(map(len, self._tables)) >= ROWS_PER_PART
        if full or time.monotonic() - self._saved_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are not on disk yet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._unsaved:
            table = pa.concat_tables(self._tables).sort_by("index")
            path = self._folder / f"part-{rank():05d}-{self._number:05d}.parquet"
            with room_to_write(self._folder), atomic_file(path) as temporary:
                pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
            self._unsaved = 0
            if len(table) >= ROWS_PER_PART:
                self._tables, self._number = [], self._number + 1
        self._saved_at = time.monotonic()


@contextlib.contextmanager
def room_to_write(folder: Path) -> Iterator[None]:
    """Turn a full disk into a one-line error."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise FastDraftError(
            f"{folder}: no space left to write ({error.strerror}). Finished rows are kept: free "
            "some space and run again"
        ) from error


def has_parts(folder: Path) -> bool:
    """Return whether a folder holds parts."""
    return next(folder.glob(PARTS), None) is not None


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of a part, or raise `FastDraftError` if the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        return file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FastDraftError(
            f"{path}: damaged ({reason}). Delete this file and run again; only its rows are made "
            "again"
        ) from error


def stored_indices(folder: Path) -> np.ndarray:
    """Return the sorted indices of the rows in a folder's parts."""
    found = [read_part(path, ["index"])["index"].to_numpy() for path in folder.glob(PARTS)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def iter_tables(folder: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield a folder's parts from the smallest first index to the largest."""
    paths = folder.glob(PARTS)
    for path in sorted(paths, key=lambda p: read_part(p, ["index"])["index"][:1].to_pylist()):
        yield read_part(path, columns)


def iter_rows(
    folder: Path, columns: Sequence[str] | None = None, only: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """Yield every row by increasing index, whoever wrote it, with few parts in memory at a time.

    Rows always have their ``index``. ``only`` limits them to these indices.
    """
    import pyarrow as pa

    waiting: list[tuple[int, dict[str, Any]]] = []
    wanted = None if columns is None else list(dict.fromkeys(["index", *columns]))
    for table in iter_tables(folder, wanted):
        if only is not None:
            table = table.filter(pa.array(np.isin(table["index"].to_numpy(), only)))
        rows = table.to_pylist()
        # Parts are sorted and come by their first index, so no later row is before this one.
        while waiting and rows and waiting[0][0] < rows[0]["index"]:
            yield heapq.heappop(waiting)[1]
        for row in rows:
            heapq.heappush(waiting, (row["index"], row))
    while waiting:
        yield heapq.heappop(waiting)[1]
