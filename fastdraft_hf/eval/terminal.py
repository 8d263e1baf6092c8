"""Tables of results on the terminal (standard error)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fastdraft_hf.eval.summary import (
    BENCH_TABLES,
    SPEED_NOTE,
    acceptance_rows,
    cut_sentence,
    estimators_sentence,
    greedy_sentence,
    held_out_sentence,
    speed_rows,
    verdict,
)


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Print rows of equal keys to standard error."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    # A log has no width of its own; a table cut at 80 columns would lose figures.
    width = max(Console(stderr=True).width, 170)
    Console(stderr=True, width=width).print(table)


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """Print the acceptance table and its sentences to standard error."""
    print_table(acceptance_rows(evaluation))
    print("", file=sys.stderr)
    for sentence in (estimators_sentence, held_out_sentence, cut_sentence, greedy_sentence):
        if text := sentence(evaluation):
            print(text, file=sys.stderr)


def print_bench(bench: dict[str, Any]) -> None:
    """Print the tables of a benchmark and its verdict to standard error."""
    if bench["paths"]:
        print_table(speed_rows(bench))
        print(f"\n{SPEED_NOTE}", file=sys.stderr)
    for heading, rows in BENCH_TABLES:
        if found := rows(bench):
            print(f"\n{heading}", file=sys.stderr)
            print_table(found)
    print("\n" + " ".join(filter(None, (verdict(bench), cut_sentence(bench)))), file=sys.stderr)
