"""Tables of results on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fastdraft_hf.eval.summary import (
    acceptance_rows,
    estimators_sentence,
    held_out_sentence,
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
    # A log has no width of its own; a table cut at 80 columns would lose the figures.
    console = Console(stderr=True)
    Console(stderr=True, width=max(console.width, 170)).print(table)


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """Print the acceptance table and what is to be said about it."""
    print_table(acceptance_rows(evaluation))
    print("", file=sys.stderr)
    for sentence in (estimators_sentence(evaluation), held_out_sentence(evaluation)):
        if sentence:
            print(sentence, file=sys.stderr)
    same, total = evaluation["greedy_identical"], evaluation["greedy_prompts"]
    print(
        f"greedy output identical to the target alone: {same} of {total} prompts", file=sys.stderr
    )
