"""One progress display for every stage: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from fastdraft_hf._processes import is_main

# How often a log gets a line.
LOG_SECONDS = 15.0


class Progress:
    """Shows how far a piece of work is, its rate and its remaining time, in the main process.

    Args:
        label: the work.
        total: its amount in ``unit``; ``None`` if it is unknown.
        unit: what is counted (``"tokens"``, ``"prompts"``).
        done: the amount that an earlier run did; it does not count towards the rate.
    """

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = self._start_done = done
        self._start = self._last = time.monotonic()
        self._note = ""
        self._bar: tqdm[None] | None = None
        if is_main() and sys.stderr.isatty():
            self._bar = tqdm(
                desc=label, total=total, initial=done, unit=f" {unit}", dynamic_ncols=True
            )

    def found(self, done: float, total: float) -> None:
        """Set what an earlier run did, if that becomes known after the display was opened."""
        self._done = self._start_done = done
        self._total = total
        self._start = time.monotonic()
        if self._bar is not None:
            self._bar.reset(total)
            self._bar.initial = self._bar.n = done

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count ``amount`` more; ``note`` replaces the text at the end of the line."""
        self._done += amount
        if note is not None:
            self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._last > LOG_SECONDS:
            self._last = time.monotonic()
            self._print()

    def _print(self) -> None:
        if not is_main():
            return
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._start_done) / seconds
        total = f"/{self._total:,.0f}" if self._total else ""
        parts = [f"{self._label}: {self._done:,.0f}{total} {self._unit}"]
        if 0 < rate < 1:  # as tqdm does
            parts.append(f"{1 / rate:,.1f} s per {self._unit.removesuffix('s')}")
        else:
            parts.append(f"{rate:,.1f} {self._unit}/s")
        if self._total and rate > 0:
            left = max(0.0, self._total - self._done) / rate
            parts.append(f"{tqdm.format_interval(left)} left")
        if self._note:
            parts.append(self._note)
        print(", ".join(parts), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print()
