"""One progress display for every stage: a bar in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from fastdraft_hf._processes import is_main

# How often a log without a terminal gets a line.
LOG_SECONDS = 15.0


class Progress:
    """Shows progress, rate and remaining time, in the main process only.

    Args:
        label: what is being done.
        total: how much there is to do, in ``unit``; ``None`` if unknown.
        unit: what is counted (``"tokens"``, ``"prompts"``).
        done: how much an earlier run did; it does not count into the rate.
    """

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._done = self._start_done = done
        self._start = self._last = time.monotonic()
        self._note = ""
        self._bar: Any = None
        self._task: Any = None
        self._silent = not is_main()
        if sys.stderr.isatty() and not self._silent:
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(
            self.label, total=self.total, completed=self._done, rate="", note=""
        )

    def found(self, done: float, total: float) -> None:
        """Set what an earlier run did, if that is known only after the display was opened."""
        self._done = self._start_done = done
        self.total = total
        self._start = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    @property
    def rate(self) -> float:
        """Units a second since this display was opened."""
        seconds = time.monotonic() - self._start
        return (self._done - self._start_done) / seconds if seconds > 0 else 0.0

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count ``amount`` more; ``note`` replaces the text at the end of the line."""
        self._done += amount
        if note is not None:
            self._note = note
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._done,
                rate=f"{self.rate:,.1f} {self.unit}/s",
                note=self._note,
            )
        elif not self._silent and time.monotonic() - self._last > LOG_SECONDS:
            self._last = time.monotonic()
            self._print()

    def _print(self) -> None:
        parts = [f"{self.label}: {self._done:,.0f}"]
        if self.total:
            parts[0] += f"/{self.total:,.0f}"
        parts[0] += f" {self.unit}"
        parts.append(f"{self.rate:,.1f} {self.unit}/s")
        if self.total and self.rate > 0:
            left = max(0.0, self.total - self._done) / self.rate
            parts.append(f"about {left:,.0f} s left")
        if self._note:
            parts.append(self._note)
        print(", ".join(parts), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and not self._silent:
            self._print()
