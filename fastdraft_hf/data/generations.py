"""Rows that the target generates: what is requested, and a set of parquet parts that holds it.

A row depends only on its set's seed and its index, not on the process that wrote it, on its batch
or on what was written before. It carries the token ids as generated; text is never tokenized
again. A set is complete when all its indices are in parts, or when its time is up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import barrier, on_main, rank, world
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.engines import Completion, Engine, Request
from fastdraft_hf.data.parts import (
    FLUSH_SECONDS,
    PartWriter,
    has_parts,
    iter_rows,
    room_to_write,
    stored_indices,
)


class Requests(Sequence[Request]):
    """A numbered request for every prompt and temperature, prompt by prompt.

    Args:
        prompts: token ids.
        temperatures: 0 is greedy.
        max_new_tokens: length limit of a completion.
        seed: of the set. Every row gets its own seed from it.
        source: name of the set.
        temperatures_per_prompt: ``one`` gives the prompts one temperature each, in turn; ``all``
            requests every prompt at every temperature.
        top_p: nucleus to sample from.
    """

    def __init__(
        self,
        prompts: Sequence[tuple[int, ...]],
        *,
        temperatures: Sequence[float],
        max_new_tokens: int,
        seed: int,
        source: str,
        temperatures_per_prompt: Literal["one", "all"] = "one",
        top_p: float = 1.0,
    ) -> None:
        self._prompts, self._seed, self._source = prompts, seed, source
        self._max_new_tokens, self._top_p = max_new_tokens, top_p
        self._temperatures, self._all = temperatures, temperatures_per_prompt == "all"

    def __len__(self) -> int:
        return len(self._prompts) * (len(self._temperatures) if self._all else 1)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        temperature = self._temperatures[index % len(self._temperatures)]
        return Request(
            index=index,
            prompt_ids=self._prompts[index // len(self._temperatures) if self._all else index],
            temperature=temperature,
            # Spread, so that recipes with neighboring seeds do not share rows.
            seed=(self._seed * 1_000_003 + index) % (2**31),
            max_new_tokens=self._max_new_tokens,
            source=self._source,
            top_p=self._top_p if temperature > 0 else 1.0,
        )


def write_rows(
    engine: Engine,
    requests: Sequence[Request],
    folder: Path,
    *,
    rows_per_part: int = 1024,
    max_minutes: float | None = None,
) -> None:
    """Generate every requested row that is in no part of ``folder`` yet.

    Every process calls this with the same requests, writes its share of the missing rows and
    returns when the set is complete.

    Args:
        engine: generates.
        requests: numbered 0, 1, 2, …
        folder: of the parts; created if missing.
        rows_per_part: rows of a parquet file.
        max_minutes: stop after this much time of generation, over all runs of this folder. What
            unfinished rows have by then is kept, as if it were their length limit. Each process
            stops by its own clock.

    Raises:
        FastDraftError: the disk is full or a part is damaged. Finished rows are kept.
    """

    def look() -> tuple[np.ndarray, float]:
        with room_to_write(folder):
            folder.mkdir(parents=True, exist_ok=True)
        clocks = [json.loads(path.read_text())["seconds"] for path in folder.glob("clock-*.json")]
        missing = np.setdiff1d(np.arange(len(requests)), stored_indices(folder))
        return missing, max(clocks, default=0.0)

    def finish() -> None:
        if not has_parts(folder):  # a set without rows has a schema too
            import pyarrow.parquet as pq

            with room_to_write(folder):
                pq.write_table(_table([]), folder / "part-00000-00000.parquet")

    missing, seconds_before = on_main(look)
    clock = _Clock(folder, seconds_before, max_minutes)
    mine = missing[:0] if clock.is_over() else missing[rank() :: world()]
    found, tokens = len(requests) - len(missing), 0

    def due() -> Iterator[Request]:
        for index in mine:
            if clock.is_over():
                return
            yield requests[int(index)]

    def on_tokens(new: int) -> bool:
        nonlocal tokens
        tokens += new
        progress.advance(0, note=f"{tokens:,} tokens")
        return clock.is_over()

    label = f"generate {folder.name}"
    with (
        Progress(label, found + len(mine), "rows", done=found) as progress,
        clock,
        PartWriter(folder, rows_per_part=rows_per_part) as writer,
    ):
        for completion in engine.generate(due(), on_tokens):
            writer.add(_table([completion]))
            clock.save(every=FLUSH_SECONDS)
            progress.advance(1)
    barrier()
    on_main(finish)


class _Clock:
    """This process's time of generation, kept over runs where ``max_minutes`` limits it."""

    def __init__(self, folder: Path, before: float, max_minutes: float | None) -> None:
        self._path = folder / f"clock-{rank():05d}.json"
        self._limit = None if max_minutes is None else 60 * max_minutes
        self._start = self._saved_at = time.monotonic()
        self._start -= before

    def is_over(self) -> bool:
        return self._limit is not None and time.monotonic() - self._start >= self._limit

    def save(self, every: float = 0.0) -> None:
        now = time.monotonic()
        if self._limit is not None and now - self._saved_at >= every:
            with room_to_write(self._path.parent):
                write_json(self._path, {"seconds": now - self._start})
            self._saved_at = now

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *error: object) -> None:
        self.save()


def _table(completions: Sequence[Completion]) -> Any:
    import pyarrow as pa

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
            **vars(completion.request),
            "prompt_hash": completion.request.prompt_hash,
            "completion_ids": completion.ids,
            "finish_reason": completion.finish_reason,
        }
        for completion in completions
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def check_set(folder: Path) -> None:
    """Raise `FastDraftError` if a folder is not a generated set."""
    if not has_parts(folder):
        raise FastDraftError(f"{folder}: not a generated set (it has no part-*.parquet)")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return every row of a set by increasing index.

    Raises:
        FastDraftError: it is not a set, or a part is damaged.
    """
    check_set(folder)
    return list(iter_rows(folder))
