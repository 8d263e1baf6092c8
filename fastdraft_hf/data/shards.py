"""The files of a set of generated rows: their names, and a shard with the facts to check it by.

Beside a shard stands a small JSON file with its SHA-256. It is written first: a shard is sound if
it exists and matches its facts, whenever the process that wrote it was killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import atomic_file, sha256_file, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion

MANIFEST = "manifest.json"  # of a finished set
STATE = "state.json"  # of one that was begun

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("index", pa.int32()),
            ("source", pa.string()),
            # Parquet has no type for ids below 32 bits; its dictionaries pack them.
            ("prompt_ids", pa.list_(pa.int32())),
            ("completion_ids", pa.list_(pa.int32())),
            ("finish_reason", pa.string()),
            ("temperature", pa.float32()),
            ("top_p", pa.float32()),
            ("sample", pa.int32()),
            ("seed", pa.int64()),
            ("prompt_hash", pa.string()),
        ]
    )


def shard_path(folder: Path, number: int) -> Path:
    """Return where shard ``number`` of a set stands."""
    return folder / f"part-{number:05d}.parquet"


def shard_number(path: Path) -> int:
    """Return the number of a shard by its name."""
    return int(path.stem.removeprefix("part-"))


def begun_path(folder: Path, process: int) -> Path:
    """Return where a process saves rows of shards that are not whole."""
    return folder / f"begun-{process:05d}.parquet"


def sign_path(folder: Path, process: int, count: int) -> Path:
    """Return the sign of life of one of ``count`` processes."""
    return folder / f"process-{process:05d}-of-{count:05d}.json"


def row_of(completion: Completion) -> dict[str, Any]:
    """Return the row that a completion becomes."""
    request = completion.request
    return {
        "index": request.index,
        "source": request.source,
        "prompt_ids": list(request.prompt_ids),
        "completion_ids": list(completion.ids),
        "finish_reason": completion.finish_reason,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "sample": request.sample,
        "seed": request.seed,
        "prompt_hash": request.prompt_hash,
    }


def facts_path(shard: Path) -> Path:
    """Return where the facts of a shard stand."""
    return shard.with_suffix(".json")


def write_shard(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows in the order of their ``index``; the file appears when it is whole.

    Raises:
        FastDraftError: the disk is full.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(rows, key=lambda row: row["index"])
    with room_to_write(path.parent), atomic_file(path) as temporary:
        table = pa.Table.from_pylist(ordered, schema=_schema())
        pq.write_table(table, temporary, compression="zstd")
        write_facts(path, sha256_file(temporary), ordered)


def write_facts(path: Path, digest: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write what is known of a shard beside it."""
    tokens = sum(len(row["completion_ids"]) for row in rows)
    write_json(facts_path(path), {"sha256": digest, "rows": len(rows), "completion_tokens": tokens})


def read_sound(path: Path, digest: str) -> list[dict[str, Any]]:
    """Return the rows of a shard of a finished set.

    Raises:
        FastDraftError: its checksum is not ``digest``, the manifest's.
    """
    if not path.exists() or sha256_file(path) != digest:
        raise FastDraftError(f"{path}: missing or damaged; delete the set's folder and rerun")
    return read_shard(path)


def read_shard(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a shard."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def read_facts(path: Path) -> dict[str, Any] | None:
    """Return what is known of a shard (sha256, rows, completion_tokens), or None."""
    try:
        facts = json.loads(facts_path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "sha256" in facts else None


def is_sound(path: Path) -> bool:
    """Return whether a shard exists and its bytes are those that were written."""
    facts = read_facts(path)
    return facts is not None and path.exists() and sha256_file(path) == facts["sha256"]


@contextlib.contextmanager
def room_to_write(folder: Path) -> Iterator[None]:
    """Turn a full disk into an error a user can mend."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise FastDraftError(
            f"{folder}: no room left to write ({error.strerror}); every finished shard is kept: "
            "make room and run again to go on"
        ) from error
