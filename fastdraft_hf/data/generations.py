"""Rows that the target generates: what is requested, and a set of parquet parts that holds it.

A row depends only on its set's seed and its index, not on the process that wrote it, on its batch
or on what was written before. It carries the token ids as generated; text is never tokenized
again. A set is complete when all its indices are in parts, or when its time is up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import barrier, on_main, rank, world
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.engines import Completion, Engine, Request
from fastdraft_hf.data.parts import (
    PartWriter,
    has_parts,
    room_to_write,
    stored_indices,
)

# In the folder of a set whose time is up.
TIME_IS_UP = "time_is_up"


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
) -> None:
    """Generate every requested row that is in no part of ``folder`` yet.

    Every process calls this with the same requests, writes its share of the missing rows and
    returns when the set is complete.

    Args:
        engine: generates.
        requests: numbered 0, 1, 2, …
        folder: of the parts.
        max_minutes: stop after this time. What unfinished rows have by then is kept, as if it were
            their length limit. Each process stops by its own clock; a run that resumes starts it
            again.

    Raises:
        FastDraftError: the disk is full or a part is damaged. Finished rows are kept.
    """
    start, tokens = time.monotonic(), 0

    def is_over() -> bool:
        return max_minutes is not None and time.monotonic() - start >= 60 * max_minutes

    def look() -> np.ndarray:
        with room_to_write(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if (folder / TIME_IS_UP).exists():
            return np.zeros(0, np.int64)
        return np.setdiff1d(np.arange(len(requests)), stored_indices(folder))

    def finish() -> None:
        with room_to_write(folder):
            if not has_parts(folder):  # a set without rows has a schema too
                import pyarrow.parquet as pq

                pq.write_table(_table([]), folder / "part-00000-00000.parquet")
            if max_minutes is not None and len(stored_indices(folder)) < len(requests):
                (folder / TIME_IS_UP).touch()

    missing = on_main(look)
    mine = missing[rank() :: world()]
    found = len(requests) - len(missing)

    def due() -> Iterator[Request]:
        for index in mine:
            if is_over():
                return
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
            progress.advance(1)
    barrier()
    on_main(finish)


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
            **{name: getattr(completion.request, name) for name in Request.__slots__},
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
