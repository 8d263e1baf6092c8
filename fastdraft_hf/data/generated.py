"""Rows the target wrote, in parquet shards that `datasets.load_dataset` reads.

A set is a folder of shards, each holding a fixed range of requests and renamed into place when
whole, so that a killed run repeats at most the shards that were being written: no row is lost,
none is doubled. A row carries the token ids as generated; text is never tokenised again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import atomic_file, sha256_file, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion, Engine
from fastdraft_hf.data.requests import Request

MANIFEST = "manifest.json"
_STATE = "state.json"


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("index", pa.int32()),
            ("source", pa.string()),
            ("prompt_ids", pa.list_(pa.int32())),
            ("completion_ids", pa.list_(pa.int32())),
            ("finish_reason", pa.string()),
            ("temperature", pa.float32()),
            ("seed", pa.int64()),
            ("prompt_hash", pa.string()),
        ]
    )


def _row(completion: Completion) -> dict[str, Any]:
    request = completion.request
    return {
        "index": request.index,
        "source": request.source,
        "prompt_ids": list(request.prompt_ids),
        "completion_ids": list(completion.ids),
        "finish_reason": completion.finish_reason,
        "temperature": request.temperature,
        "seed": request.seed,
        "prompt_hash": request.prompt_hash,
    }


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def _write_shard(path: Path, completions: Sequence[Completion]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = sorted((_row(c) for c in completions), key=lambda row: row["index"])
    with atomic_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), temporary)


def write_rows(
    engine: Engine,
    requests: Sequence[Request],
    folder: Path,
    *,
    rows_per_shard: int = 128,
    max_minutes: float | None = None,
    on_progress: Callable[[int, int], None] = lambda rows, tokens: None,
) -> None:
    """Let the target write every request that no finished shard of ``folder`` holds yet.

    Args:
        engine: what writes.
        requests: numbered 0, 1, 2, …; shard ``k`` holds requests ``[k*n, (k+1)*n)``.
        folder: where shards go; made if missing.
        rows_per_shard: ``n``. A folder that was begun with another number keeps its own.
        max_minutes: stop starting new rows after this much writing time, over all runs of this
            folder; rows already begun are finished and kept.
        on_progress: called with (rows finished since the last call, tokens likewise).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        return
    state_path = folder / _STATE
    size, before, start = rows_per_shard, 0.0, time.monotonic()
    if state_path.exists():
        state = json.loads(state_path.read_text(encoding="utf-8"))
        size, before = int(state["rows_per_shard"]), float(state["seconds"])

    def seconds() -> float:
        return before + time.monotonic() - start

    def save_state() -> None:
        write_json(state_path, {"seconds": seconds(), "rows_per_shard": size})

    save_state()
    expected: dict[int, int] = {}
    for request in requests:
        expected[request.index // size] = expected.get(request.index // size, 0) + 1
    done = {number for number in expected if _shard_path(folder, number).exists()}

    def due() -> Iterator[Request]:
        for request in requests:
            if request.index // size in done:
                continue
            if max_minutes is not None and seconds() > 60 * max_minutes:
                return
            yield request

    open_shards: dict[int, list[Completion]] = {}
    for completion in engine.generate(due(), lambda tokens: on_progress(0, tokens)):
        number = completion.request.index // size
        rows = open_shards.setdefault(number, [])
        rows.append(completion)
        on_progress(1, 0)
        if len(rows) == expected[number]:
            _write_shard(_shard_path(folder, number), open_shards.pop(number))
            save_state()
    for number, rows in open_shards.items():  # the time was up in the middle of these
        _write_shard(_shard_path(folder, number), rows)
    save_state()
    _write_manifest(folder, seconds())


def _write_manifest(folder: Path, seconds: float) -> None:
    shards = sorted(folder.glob("part-*.parquet"))
    rows = [row for shard in shards for row in _read_shard(shard)]
    write_json(
        folder / MANIFEST,
        {
            "rows": len(rows),
            "completion_tokens": sum(len(row["completion_ids"]) for row in rows),
            "seconds": round(seconds, 1),
            "shards": {shard.name: sha256_file(shard) for shard in shards},
        },
    )
    (folder / _STATE).unlink(missing_ok=True)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return every row of a finished set, in request order.

    Raises:
        FastDraftError: the set is unfinished, or a shard's checksum is not the manifest's.
    """
    manifest_path = folder / MANIFEST
    if not manifest_path.exists():
        raise FastDraftError(f"{folder}: no finished set of generated text ({MANIFEST} is missing)")
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    for name, digest in manifest["shards"].items():
        shard = folder / name
        if not shard.exists() or sha256_file(shard) != digest:
            raise FastDraftError(f"{shard}: missing or damaged; delete the set's folder and rerun")
        rows += _read_shard(shard)
    return rows


def _read_shard(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows
