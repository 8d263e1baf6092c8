"""The display of a long piece of work."""

import sys
import time

import pytest

from fastdraft_hf._progress import LOG_SECONDS, Progress


@pytest.mark.parametrize(("rows", "rate"), [(25, "1.00rows/s"), (5, "5.00s/rows")])
def test_rows_of_an_earlier_run_do_not_count_towards_the_rate(
    rows: int, rate: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with Progress("generate chat", 6000, "rows", done=3000) as progress:
        progress._time = time.time
        progress.start_t = progress.last_print_t = now
        now = 110.0 + LOG_SECONDS
        progress.advance(rows, note="9 tokens")
        line = capsys.readouterr().err
    assert line.startswith(f"generate chat: {3000 + rows}/6000 rows, ")
    assert rate in line
    assert line.endswith(" left, 9 tokens\n")
    assert capsys.readouterr().err.count("\n") == 1


def test_the_other_processes_are_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Progress("generate", 2, "rows", done=1) as progress:
        progress.advance(1, note="9 tokens")
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("generate", 4, "rows", done=1) as progress:
        progress.advance(3, note="9 tokens")
    shown = capsys.readouterr().err
    assert "generate: 100%" in shown
    assert "4/4" in shown
    assert "9 tokens" in shown
