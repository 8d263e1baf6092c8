"""Rows that the target generates, and the parquet parts that hold rows.

A row depends only on its set's seed and its index, not on the process that wrote it, on its batch
or on what was written before. It carries the token ids as generated; text is never tokenized
again. A set is complete when all its indices are in parts, or when its time is up.

Each process writes files of its own, ``part-<rank>-<number>.parquet``. A part appears under its
name when it is complete and is replaced by a longer one until it is full, so a kill loses at most
the rows of the last `FLUSH_SECONDS`. What is missing is the indices wanted less those in parts,
whoever wrote them. So a run may resume with any number of processes.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastdraft_hf._atomic import atomic_file
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import barrier, on_main, rank, world
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.engines import Completion, Engine, Request

PARTS = "part-*.parquet"
ROWS_PER_PART = 1024
# A part that is not full is written this often.
FLUSH_SECONDS = 30.0
# A time limit leaves a set so many tokens; fewer would give no block to train on.
LEAST_TOKENS = 1024
# In the folder of a set whose time is up.
TIME_IS_UP = "time_is_up"


class PartWriter:
    """Write this process's parts of a folder. Leaving the context writes what is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
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
        if self._unsaved:
            table = pa.concat_tables(self._tables).sort_by("index")
            path = self._folder / f"part-{rank():05d}-{self._number:05d}.parquet"
            with atomic_file(path) as temporary:
                pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
            self._unsaved = 0
            if len(table) >= ROWS_PER_PART:
                self._tables, self._number = [], self._number + 1
        self._saved_at = time.monotonic()


def has_parts(folder: Path) -> bool:
    """Return whether a folder holds parts."""
    return next(folder.glob(PARTS), None) is not None


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of a part, or raise `FastDraftError` if the file is damaged."""
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


def iter_tables(
    folder: Path, columns: Sequence[str] | None = None, only: np.ndarray | None = None
) -> Iterator[pa.Table]:
    """Yield a folder's parts from the smallest first index to the largest; see `iter_rows`."""
    paths = folder.glob(PARTS)
    for path in sorted(paths, key=lambda p: read_part(p, ["index"])["index"][:1].to_pylist()):
        table = read_part(path, columns)
        if only is not None:
            table = table.filter(pa.array(np.isin(table["index"].to_numpy(), only)))
        yield table


def iter_rows(
    folder: Path, columns: Sequence[str] | None = None, only: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """Yield every row by increasing index, whoever wrote it, with few parts in memory at a time.

    Rows always have their ``index``. ``only`` limits them to these indices.
    """
    waiting: list[tuple[int, dict[str, Any]]] = []
    wanted = None if columns is None else list(dict.fromkeys(["index", *columns]))
    for table in iter_tables(folder, wanted, only):
        rows = table.to_pylist()
        # Parts are sorted and come by their first index, so no later row is before this one.
        while waiting and rows and waiting[0][0] < rows[0]["index"]:
            yield heapq.heappop(waiting)[1]
        for row in rows:
            heapq.heappush(waiting, (row["index"], row))
    while waiting:
        yield heapq.heappop(waiting)[1]


def build_requests(
    prompts: Sequence[tuple[int, ...]],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    source: str,
    temperatures_per_prompt: Literal["one", "all"] = "one",
    top_p: float = 1.0,
) -> list[Request]:
    """Return numbered requests, prompt by prompt, each with its own seed.

    ``temperatures_per_prompt="one"`` gives the prompts one temperature each, in turn; ``"all"``
    requests every prompt at every temperature.
    """
    every = temperatures_per_prompt == "all"
    pairs = product(prompts, temperatures) if every else zip(prompts, cycle(temperatures))
    return [
        Request(
            index=index,
            prompt_ids=ids,
            temperature=temperature,
            # Spread, so that recipes with neighboring seeds do not share rows.
            seed=(seed * 1_000_003 + index) % (2**31),
            max_new_tokens=max_new_tokens,
            source=source,
            top_p=top_p if temperature > 0 else 1.0,
        )
        for index, (ids, temperature) in enumerate(pairs)
    ]


def write_rows(
    engine: Engine,
    requests: Sequence[Request],
    folder: Path,
    *,
    max_minutes: float | None = None,
) -> int:
    """Generate every requested row that is in no part of ``folder`` yet.

    Every process calls this with the same requests, writes its share of the missing rows and
    returns when the set is complete.

    Args:
        engine: generates.
        requests: numbered 0, 1, 2, …
        folder: of the parts.
        max_minutes: stop after this time, but not before `LEAST_TOKENS`. What unfinished rows
            have by then is kept, as if it were their length limit. Each process stops by its own
            clock; a run that resumes starts it again.

    Raises:
        FastDraftError: a part is damaged. Finished rows are kept.
    """
    start, tokens = time.monotonic(), 0
    begun: dict[int, float] = {}  # when each row in flight was started
    took: list[float] = []

    def is_over(after: float = 0.0) -> bool:
        late = max_minutes is not None and time.monotonic() - start + after >= 60 * max_minutes
        return late and tokens * world() >= LEAST_TOKENS

    def look() -> np.ndarray:
        if (folder / TIME_IS_UP).exists():
            return np.zeros(0, np.int64)
        return np.setdiff1d(np.arange(len(requests)), stored_indices(folder))

    def finish() -> None:
        if not has_parts(folder):  # a set without rows has a schema too
            pq.write_table(_table([]), folder / "part-00000-00000.parquet")
        if max_minutes is not None and len(stored_indices(folder)) < len(requests):
            (folder / TIME_IS_UP).touch()

    missing = on_main(look)
    mine = missing[rank() :: world()]
    found = len(requests) - len(missing)

    def due() -> Iterator[Request]:
        for index in mine:
            # A row that would not end in time is not started: its text would be cut off.
            if is_over(after=fmean(took) if took else 0.0):
                return
            begun[int(index)] = time.monotonic()
            yield requests[int(index)]

    def on_tokens(new: int) -> bool:
        nonlocal tokens
        tokens += new
        progress.advance(0, note=f"{tokens:,} tokens")
        return is_over()

    label = f"generate {folder.name}"
    with (
        Progress(label, found + len(mine), "rows", done=found) as progress,
        PartWriter(folder) as writer,
    ):
        for completion in engine.generate(due(), on_tokens):
            writer.add(_table([completion]))
            took.append(time.monotonic() - begun.pop(completion.request.index))
            progress.advance(1)
    barrier()
    on_main(finish)
    return tokens * world()


def _table(completions: Sequence[Completion]) -> Any:
    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("source", pa.string()),
            # Parquet has no id type below 32 bits; its dictionary encoding packs them.
            ("prompt_ids", pa.list_(pa.int32())),
            ("completion_ids", pa.list_(pa.int32())),
            ("finish_reason", pa.string()),
            ("temperature", pa.float32()),
            ("top_p", pa.float32()),
            ("seed", pa.int64()),
            ("prompt_hash", pa.string()),
        ]
    )
    rows = [
        {
            **{name: getattr(completion.request, name) for name in Request.__slots__},
            "prompt_hash": completion.request.prompt_hash,
            "completion_ids": completion.ids,
            "finish_reason": completion.finish_reason,
        }
        for completion in completions
    ]
    return pa.Table.from_pylist(rows, schema=schema)
