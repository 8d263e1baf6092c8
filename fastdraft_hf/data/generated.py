"""Rows the target wrote, in parquet shards that `datasets.load_dataset` reads.

A set is a folder of shards, each holding a fixed range of requests and renamed into place when
whole, so that a killed run repeats at most the shards that were being written: no row is lost,
none is doubled. A row carries the token ids as generated; text is never tokenised again.

Several processes write one set together (`fastdraft_hf._processes`): shard k belongs to process
k modulo their number, and the first one writes the manifest when all are done. Only shards being
written are held in memory.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._processes import Process, this_process, wait_until
from fastdraft_hf.data.engines import Completion, Engine
from fastdraft_hf.data.growing import asks_for_more, reopen
from fastdraft_hf.data.requests import Request
from fastdraft_hf.data.shards import (
    MANIFEST,
    STATE,
    begun_path,
    is_sound,
    read_facts,
    read_shard,
    read_sound,
    room_to_write,
    row_of,
    shard_number,
    shard_path,
    sign_path,
    write_shard,
)

# A process that writes leaves a sign of life at least this often, whatever a shard takes.
_SIGN_SECONDS = 30.0

logger = logging.getLogger(__name__)


def write_rows(
    engine: Engine,
    requests: Sequence[Request],
    folder: Path,
    *,
    rows_per_shard: int = 128,
    max_minutes: float | None = None,
    on_progress: Callable[[int, int], None] = lambda rows, tokens: None,
    on_found: Callable[[int, int], None] = lambda rows, wanted: None,
    process: Process | None = None,
    patience_minutes: float = 30.0,
) -> None:
    """Let the target write every request that no finished shard of ``folder`` holds yet.

    With several processes, each calls this with the same requests and returns when the whole set
    is finished.

    Args:
        engine: what writes.
        requests: numbered 0, 1, 2, …; shard ``k`` holds requests ``[k*n, (k+1)*n)``. More than a
            finished folder was asked for: it is gone on with.
        folder: where shards go; made if missing.
        rows_per_shard: ``n``. A folder that was begun with another number keeps its own.
        max_minutes: stop starting new rows after this much writing time, over all runs of this
            folder; rows already begun are finished and kept.
        on_progress: called with (rows finished since the last call, tokens likewise).
        on_found: called once before anything is written, with (rows of this process that an
            earlier run left, rows of this process in all).
        process: which of how many this is; by default from RANK and WORLD_SIZE.
        patience_minutes: how long to wait for other processes that give no sign of life.

    Raises:
        FastDraftError: the disk is full, or other processes are gone. What is finished is kept.
    """
    process = process or this_process()
    with room_to_write(folder):
        # Only the first makes parents: a late process must not make a stage's folder again that
        # the first has finished and renamed.
        folder.mkdir(parents=process.first, exist_ok=True)
    if asks_for_more(folder, len(requests), max_minutes):
        if process.first:
            reopen(folder, len(requests), rows_per_shard)
        else:
            wait_until(
                lambda: not asks_for_more(folder, len(requests), max_minutes),
                folder,
                lambda: f"process 0 of {process.count} to go on with the set",
                patience_minutes,
            )
    if (folder / MANIFEST).exists():
        on_found(len(requests), len(requests))
    else:
        writing = _Writing(requests, folder, rows_per_shard, process, patience_minutes)
        on_found(*writing.found())
        if not (folder / MANIFEST).exists():
            writing.write(engine, max_minutes, on_progress)
            writing.finish()
    if process.first:
        _tidy(folder)


class _Writing:
    """One process's part of a set."""

    def __init__(
        self,
        requests: Sequence[Request],
        folder: Path,
        rows_per_shard: int,
        process: Process,
        patience_minutes: float,
    ) -> None:
        self.requests, self.folder, self.process = requests, folder, process
        self.patience = patience_minutes
        self.size = self._agree_on_size(rows_per_shard)
        self.before, self.start = self._seconds_before(), time.monotonic()
        self.time_is_up = False
        self._save(finished=False)
        self.expected = Counter(r.index // self.size for r in requests if self._is_mine(r))
        self.done = {number for number in self.expected if self._is_done(number)}
        # Rows of unfinished shards, by shard and index.
        self.open: dict[int, dict[int, dict[str, Any]]] = {}
        self._take_up_begun()

    def found(self) -> tuple[int, int]:
        """Return how many of this process's rows are there, and how many it is to bring."""
        there = sum(self.expected[number] for number in self.done)
        return there + sum(map(len, self.open.values())), self.expected.total()

    def _agree_on_size(self, wanted: int) -> int:
        path = self.folder / STATE
        if self.process.first and not path.exists():
            with room_to_write(self.folder):
                write_json(path, {"rows_per_shard": wanted})
        wait_until(
            lambda: path.exists() or self._is_over(),
            self.folder,
            lambda: f"process 0 of {self.process.count} to begin the set",
            self.patience,
        )
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["rows_per_shard"])
        except FileNotFoundError:  # the set was finished in this moment
            return wanted

    def _is_mine(self, request: Request) -> bool:
        return request.index // self.size % self.process.count == self.process.index

    def _is_over(self) -> bool:
        """Whether the first process has finished the set, or even the stage it belongs to."""
        return (self.folder / MANIFEST).exists() or not self.folder.exists()

    def shard(self, number: int) -> Path:
        return shard_path(self.folder, number)

    def _is_done(self, number: int) -> bool:
        path = self.shard(number)
        if not path.exists():
            return False
        if is_sound(path):
            return True
        logger.warning("%s: damaged or without its checksum; it is written again", path)
        path.unlink()
        return False

    def _take_up_begun(self) -> None:
        """Take up rows of unfinished shards that a run saved when it was stopped by an error."""
        for path in sorted(self.folder.glob("begun-*.parquet")):
            if not is_sound(path):
                continue
            for row in read_shard(path):
                number = row["index"] // self.size
                if number in self.expected and number not in self.done:
                    self.open.setdefault(number, {})[row["index"]] = row

    def _begun(self) -> Path:
        return begun_path(self.folder, self.process.index)

    def _sign(self, index: int) -> Path:
        return sign_path(self.folder, index, self.process.count)

    def _seconds_before(self) -> float:
        """Return the writing time of earlier runs, also of one with another number of processes."""
        own = self._sign(self.process.index)
        signs = [own] if own.exists() else sorted(self.folder.glob("process-*.json"))
        return max((float(_read(sign).get("seconds", 0)) for sign in signs), default=0.0)

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def _save(self, *, finished: bool) -> None:
        self._saved = time.monotonic()
        if not self.folder.exists():  # finished and renamed by the first process
            return
        facts = {"seconds": self.seconds(), "finished": finished, "time_is_up": self.time_is_up}
        with room_to_write(self.folder):
            write_json(self._sign(self.process.index), facts)

    def _show_life(self, seconds: float) -> None:
        """Save the time if the last sign of life is older."""
        if time.monotonic() - self._saved > seconds:
            self._save(finished=False)

    def write(
        self,
        engine: Engine,
        max_minutes: float | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Let the engine write what is missing of this process's shards."""

        def due() -> Iterator[Request]:
            for request in self.requests:
                number = request.index // self.size
                if not self._is_mine(request) or number in self.done:
                    continue
                if request.index in self.open.get(number, ()):
                    continue
                if max_minutes is not None and self.seconds() > 60 * max_minutes:
                    self.time_is_up = True
                    return
                yield request

        def on_tokens(tokens: int) -> None:
            on_progress(0, tokens)
            self._show_life(_SIGN_SECONDS)

        for number in [n for n, rows in self.open.items() if len(rows) == self.expected[n]]:
            self._close(number)  # whole, but the disk was full when it should have been written
        try:
            for completion in engine.generate(due(), on_tokens):
                self._take(completion)
                on_progress(1, 0)
            if self.open and not self.time_is_up:
                missing = sum(self.expected[n] - len(rows) for n, rows in self.open.items())
                if missing:
                    raise RuntimeError(f"engine {engine.name} left {missing} texts unwritten")
        except (Exception, KeyboardInterrupt):
            self._keep_begun()
            raise
        for number, rows in self.open.items():  # the time was up in the middle of these
            write_shard(self.shard(number), rows.values())
        self.open.clear()

    def _take(self, completion: Completion) -> None:
        index = completion.request.index
        number = index // self.size
        rows = self.open.setdefault(number, {})
        if index in rows or number in self.done:
            raise RuntimeError(f"the engine wrote text {index} twice")
        rows[index] = row_of(completion)
        if len(rows) == self.expected[number]:
            self._close(number)

    def _close(self, number: int) -> None:
        write_shard(self.shard(number), self.open[number].values())
        self.done.add(number)
        del self.open[number]
        self._show_life(1.0)

    def _keep_begun(self) -> None:
        """Save the rows of unfinished shards, so that an error costs only what was in flight."""
        try:
            if self.open:
                rows = [row for shard in self.open.values() for row in shard.values()]
                write_shard(self._begun(), rows)
            self._save(finished=False)
        except (OSError, FastDraftError) as error:
            logger.warning(
                "%s: rows of unfinished shards could not be saved: %s", self.folder, error
            )

    def finish(self) -> None:
        """Wait until every process is done; the first one then writes the manifest.

        Raises:
            FastDraftError: a process gives no sign of life, or its shard is missing or damaged.
        """
        self._save(finished=True)
        if not self.process.first:
            wait_until(
                self._is_over,
                self.folder,
                lambda: f"process 0 of {self.process.count} to finish the set",
                self.patience,
            )
            return

        def unfinished() -> list[str]:
            others = range(1, self.process.count)
            return [str(i) for i in others if not _read(self._sign(i)).get("finished")]

        wait_until(
            lambda: not unfinished(),
            self.folder,
            lambda: f"process {', '.join(unfinished())} of {self.process.count} to finish its rows",
            self.patience,
        )
        self._write_manifest()

    def _write_manifest(self) -> None:
        signs = [_read(self._sign(index)) for index in range(self.process.count)]
        shards: dict[str, str] = {}
        rows = tokens = 0
        numbers = sorted(map(shard_number, self.folder.glob("part-*.parquet")))
        for path in map(self.shard, numbers):
            mine = shard_number(path) % self.process.count == self.process.index
            # Own shards were checked when they were taken up or written.
            if not mine and not is_sound(path):
                path.unlink()
                raise FastDraftError(f"{path}: damaged, and deleted; run again to write it anew")
            facts = read_facts(path)
            assert facts is not None
            shards[path.name] = facts["sha256"]
            rows, tokens = rows + facts["rows"], tokens + facts["completion_tokens"]
        if rows != len(self.requests) and not any(sign.get("time_is_up") for sign in signs):
            raise FastDraftError(
                f"{self.folder}: {rows} of {len(self.requests)} rows are there; run again to write "
                "the others"
            )
        with room_to_write(self.folder):
            write_json(
                self.folder / MANIFEST,
                {
                    "rows": rows,
                    "requests": len(self.requests),
                    "rows_per_shard": self.size,
                    "completion_tokens": tokens,
                    "seconds": round(max(sign.get("seconds", 0.0) for sign in signs), 1),
                    "shards": shards,
                },
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished set needs."""
    for pattern in (STATE, "process-*.json", "part-*.json", "begun-*", ".*.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def iter_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every row of a finished set in request order, one shard in memory at a time.

    Raises:
        FastDraftError: the set is unfinished, or a shard's checksum is not the manifest's.
    """
    manifest_path = folder / MANIFEST
    if not manifest_path.exists():
        raise FastDraftError(f"{folder}: no finished set of generated text ({MANIFEST} is missing)")
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    for name, digest in manifest["shards"].items():
        yield from read_sound(folder / name, digest)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return every row of a finished set, in request order.

    Raises:
        FastDraftError: the set is unfinished, or a shard's checksum is not the manifest's.
    """
    return list(iter_rows(folder))
