"""The display of a long piece of work."""

from __future__ import annotations

import sys
import time

import pytest

from fastdraft_hf._progress import LOG_SECONDS, Progress


def test_what_an_earlier_run_left_counts_as_done_but_not_into_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with Progress("generate chat", None, "rows") as progress:
        now = 50.0  # found after a while: that is not time spent on rows
        progress.found(3000, 6000)
        now = 60.0 + LOG_SECONDS
        progress.advance(10 + LOG_SECONDS)
        line = capsys.readouterr().err
    rows = 3010 + LOG_SECONDS
    assert line.startswith(f"generate chat: {rows:,.0f}/6,000 rows, 1.0 rows/s")
    assert f"about {6000 - rows:,.0f} s left" in line
