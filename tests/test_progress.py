"""The display of a long piece of work."""

from __future__ import annotations

import sys
import time

import pytest

from fastdraft_hf._progress import LOG_SECONDS, Progress


@pytest.mark.parametrize(
    ("rows", "rate", "left"),
    [(25, "1.0 rows/s", "49:35 left"), (5, "5.0 s per row", "4:09:35 left")],
)
def test_rows_of_an_earlier_run_do_not_count_towards_the_rate(
    rows: int,
    rate: str,
    left: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with Progress("generate chat", None, "rows") as progress:
        now = 50.0  # the search for rows takes a while, which is not part of the rate
        progress.found(3000, 6000)
        now = 60.0 + LOG_SECONDS
        progress.advance(rows)
        line = capsys.readouterr().err
    assert line == f"generate chat: {3000 + rows:,}/6,000 rows, {rate}, {left}\n"


def test_the_other_processes_are_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Progress("generate", 2, "rows") as progress:
        progress.advance(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("generate", None, "rows") as progress:
        progress.found(1, 4)
        progress.advance(3, note="9 tokens")
    shown = capsys.readouterr().err
    assert "generate: 100%" in shown
    assert "4/4" in shown
    assert "9 tokens" in shown
