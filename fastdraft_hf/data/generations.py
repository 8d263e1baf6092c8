"""Rows that the target generates: what is requested, and a set of parquet parts that holds it.

A row depends only on its set's seed and its index, not on the process that wrote it, on its batch
or on what was written before. It carries the token ids as generated; text is never tokenized
again. A set is complete when all its indices are in parts, or when its time is up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import barrier, on_main, rank, world
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
    seconds: float = FLUSH_SECONDS,
    max_minutes: float | None = None,
    on_progress: Callable[[int, int], None] = lambda rows, tokens: None,
    on_found: Callable[[int, int], None] = lambda rows, wanted: None,
) -> None:
    """Generate every requested row that is in no part of ``folder`` yet.

    Every process calls this with the same requests, writes its share of the missing rows and
    returns when the set is complete.

    Args:
        engine: generates.
        requests: numbered 0, 1, 2, …
        folder: of the parts; created if missing.
        rows_per_part: rows of a parquet file.
        seconds: longest time between two writes of a part.
        max_minutes: stop after this much time of generation, over all runs of this folder. What
            unfinished rows have by then is kept, as if it were their length limit. Each process
            stops by its own clock.
        on_progress: called with (rows, tokens) finished since the last call.
        on_found: called once, before any row is generated, with (rows that exist, rows that exist
            when this process is done).

    Raises:
        FastDraftError: the disk is full or a part is damaged. Finished rows are kept.
    """

    def look() -> tuple[np.ndarray, float]:
        with room_to_write(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return np.setdiff1d(np.arange(len(requests)), stored_indices(folder)), _read_clocks(folder)

    missing, seconds_before = on_main(look)
    clock = _Clock(folder, seconds_before, max_minutes)
    mine = missing[:0] if clock.is_over() else missing[rank() :: world()]
    found = len(requests) - len(missing)
    on_found(found, found + len(mine))
    left = np.zeros(len(requests), bool)
    left[mine] = True

    def due() -> Iterator[Request]:
        for index in mine:
            if clock.is_over():
                return
            yield requests[int(index)]

    def on_tokens(tokens: int) -> bool:
        on_progress(0, tokens)
        return clock.is_over()

    with clock, PartWriter(folder, rows_per_part=rows_per_part, seconds=seconds) as writer:
        for completion in engine.generate(due(), on_tokens):
            index = completion.request.index
            if not left[index]:
                raise RuntimeError(f"engine {engine.name} generated row {index} twice")
            left[index] = False
            writer.add(_table([completion]))
            clock.save(every=seconds)
            on_progress(1, 0)
    if left.any() and not clock.is_over():
        raise RuntimeError(f"engine {engine.name} left out {left.sum()} rows")
    barrier()
    on_main(lambda: _finish(folder))


def _finish(folder: Path) -> None:
    """Give a set without rows its schema, so that every reader finds parts."""
    if not has_parts(folder):
        import pyarrow.parquet as pq

        with room_to_write(folder):
            pq.write_table(_table([]), folder / "part-00000-00000.parquet")


class _Clock:
    """This process's time of generation, kept over runs where ``max_minutes`` limits it."""

    def __init__(self, folder: Path, before: float, max_minutes: float | None) -> None:
        self._path = folder / f"clock-{rank():05d}.json"
        self._limit = None if max_minutes is None else 60 * max_minutes
        self._before = before
        self._start = self._saved_at = time.monotonic()

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def is_over(self) -> bool:
        return self._limit is not None and self.seconds() >= self._limit

    def save(self, every: float = 0.0) -> None:
        if self._limit is not None and time.monotonic() - self._saved_at >= every:
            with room_to_write(self._path.parent):
                write_json(self._path, {"seconds": self.seconds()})
            self._saved_at = time.monotonic()

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *error: object) -> None:
        self.save()


def _read_clocks(folder: Path) -> float:
    """Return the seconds of the process that generated longest."""
    clocks = [json.loads(path.read_text()) for path in folder.glob("clock-*.json")]
    return max((float(clock["seconds"]) for clock in clocks), default=0.0)


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
            "index": completion.request.index,
            "source": completion.request.source,
            "prompt_ids": completion.request.prompt_ids,
            "completion_ids": completion.ids,
            "finish_reason": completion.finish_reason,
            "temperature": completion.request.temperature,
            "top_p": completion.request.top_p,
            "seed": completion.request.seed,
            "prompt_hash": completion.request.prompt_hash,
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
