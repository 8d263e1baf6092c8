"""Prompts of any dataset: a column of texts, or of chats up to the user's last turn.

`datasets` streams the dataset, from the Hub or from local files, so only what is used is fetched.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError, nearest

# Suffix of a local file -> its reader in `datasets`.
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
# Columns to look for if none is named; the first that exists is used.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("prompt", "instruction", "question", "text")
# Rows shuffled at a time: sorted datasets are common, and a stream has no random access.
SHUFFLED = 10_000

# The two common forms of a turn, and the speakers' names in the second.
_FORMS = (("role", "content"), ("from", "value"))
_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}

Conversation = tuple[tuple[str, str], ...]


def check_local(dataset: str, where: str) -> None:
    """Raise `FastDraftError` for a local path that does not exist or a file of unknown kind.

    Args:
        dataset: an id on the Hub, a file or a folder.
        where: the setting that names it, for the error (``"tasks.mine.dataset"``).
    """
    path = Path(dataset).expanduser()
    local = path.suffix in FORMATS or dataset.startswith((".", "/", "~"))
    if local and not path.exists():
        raise FastDraftError(f"{where}: there is no file or folder {dataset}")
    if path.is_file() and path.suffix not in FORMATS:
        raise FastDraftError(
            f"{where}: {dataset} has an unknown suffix; known: {', '.join(FORMATS)}"
        )


def read_dataset(
    dataset: str, name: str | None, split: str, revision: str | None, where: str, advice: str
) -> Iterator[dict[str, Any]]:
    """Yield rows. A dataset on the Hub is streamed, so only what is read is fetched.

    Args:
        dataset: an id on the Hub, a file, a folder of files or one written by ``save_to_disk``.
        name: its configuration.
        split: the split.
        revision: branch, tag or commit on the Hub.
        where: the setting that names it, for errors (``"tasks.mine"``).
        advice: what to do if a dataset on the Hub cannot be read.

    Raises:
        FastDraftError: it cannot be read.
    """
    import datasets

    path = Path(dataset).expanduser()
    try:
        if path.is_file():
            stream = datasets.load_dataset(
                FORMATS[path.suffix], data_files={split: str(path)}, split=split, streaming=True
            )
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            stream = datasets.load_from_disk(str(path))
            if isinstance(stream, dict):
                stream = stream[split]
        else:
            stream = datasets.load_dataset(
                str(path) if path.is_dir() else dataset,
                name,
                split=split,
                revision=revision,
                streaming=True,
            )
        for row in stream:
            yield dict(row)
    # Readers, networks and file systems have many exceptions; all mean that it cannot be read.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "check the file" if path.exists() else advice
        raise FastDraftError(f"{where}: cannot read {dataset} ({reason}); {what}") from error


@dataclass(frozen=True)
class PromptSet:
    """A dataset with prompts.

    Attributes:
        dataset: id on the Hub, or a local jsonl, json, parquet, csv or txt file or folder.
        name: the dataset's configuration.
        split: the split.
        column: the column of the prompt; by default found by its name.
        revision: branch, tag or commit on the Hub.
        context_columns: text columns to append to a prompt that is text, separated by blank lines.
    """

    dataset: str
    name: str | None = None
    split: str = "train"
    column: str | None = None
    revision: str | None = None
    context_columns: tuple[str, ...] = ()

    def check(self) -> str:
        """Read the first row and return the column of the prompt.

        Raises:
            FastDraftError: the dataset cannot be read, is empty, or has no column of prompts.
        """
        first = next(self._rows(), None)
        if first is None:
            raise FastDraftError(f"dataset: {self.dataset} has no rows ({self.split})")
        column = self.column
        if column is None:
            known = (*CHAT_COLUMNS, *TEXT_COLUMNS)
            column = next((name for name in known if name in first), None)
            if column is None:
                raise FastDraftError(
                    f"column: {self.dataset} has none of {', '.join(known)}; name one of its "
                    f"columns: {', '.join(first)}"
                )
        if column not in first:
            raise FastDraftError(
                f"column: {self.dataset} has no column '{column}'{nearest(column, first)}; it has: "
                f"{', '.join(first)}"
            )
        for name in self.context_columns:
            if name not in first:
                raise FastDraftError(
                    f"context_columns: {self.dataset} has no column '{name}'"
                    f"{nearest(name, first)}; it has: {', '.join(first)}"
                )
        if self.context_columns and isinstance(first[column], list):
            raise FastDraftError(
                f"context_columns: '{column}' holds chats; they need a column of texts"
            )
        if not isinstance(first[column], (str, list)):
            raise FastDraftError(
                f"column: '{column}' of {self.dataset} holds neither text nor chat messages but "
                f"{type(first[column]).__name__}; it has: {', '.join(first)}"
            )
        return column

    def conversations(self, seed: int, counts: Counter[str]) -> Iterator[Conversation]:
        """Yield each row's chat up to the user's last turn, shuffled by ``seed`` (`SHUFFLED`).

        A text is one turn of the user. Rows without a prompt are counted: ``empty``, ``no user
        turn``, ``no chat`` (unknown roles or forms, or content that is not text).
        """
        column = self.check()
        for row in _shuffled(self._rows(), seed):
            value = row.get(column)
            if isinstance(value, str) and value.strip():
                more = (str(row.get(name) or "").strip() for name in self.context_columns)
                value = "\n\n".join([value.strip(), *filter(None, more)])
            turns = conversation(value)
            if isinstance(turns, str):
                counts[turns] += 1
            else:
                yield turns

    def _rows(self) -> Iterator[dict[str, Any]]:
        check_local(self.dataset, "dataset")
        return read_dataset(
            self.dataset,
            self.name,
            self.split,
            self.revision,
            where="dataset",
            advice="check the id, the network and that it needs no gate, or name a local copy",
        )


def _shuffled(rows: Iterator[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows in the seed's order, ``SHUFFLED`` at a time.

    The shuffle of `datasets` streams (5.0) sleeps for seconds at the end of a parquet file.
    """
    source = random.Random(seed)
    while chunk := list(itertools.islice(rows, SHUFFLED)):
        source.shuffle(chunk)
        yield from chunk


def conversation(value: Any) -> Conversation | str:
    """Return a cell's chat up to the user's last turn, or the reason why it has none.

    Args:
        value: a text, or a list of turns with ``role`` and ``content``, or ``from`` and ``value``.
            Content may be a list of text parts.
    """
    if isinstance(value, str):
        return (("user", value.strip()),) if value.strip() else "empty"
    if not value:
        return "empty"
    if not isinstance(value, list):
        return "no chat"
    turns = []
    for turn in value:
        found = _turn(turn)
        if found is None:
            return "no chat"
        turns.append(found)
    last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=None)
    if last is None:
        return "no user turn"
    if not turns[last][1].strip():
        return "empty"
    return tuple(turns[: last + 1])


def _turn(turn: Any) -> tuple[str, str] | None:
    if not isinstance(turn, dict):
        return None
    for speaker, words in _FORMS:
        # A table gives every row the columns of all; missing ones are None.
        if turn.get(speaker) is not None and turn.get(words) is not None:
            role, content = _ROLES.get(turn[speaker]), turn[words]
            if isinstance(content, list) and all(
                isinstance(part, dict) and part.get("type") == "text" and "text" in part
                for part in content
            ):
                content = "".join(str(part["text"]) for part in content)
            if role is None or not isinstance(content, str):
                return None
            return role, content
    return None
