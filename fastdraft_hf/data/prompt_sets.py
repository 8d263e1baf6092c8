"""Prompts of any dataset: a column of texts, or of chats up to the user's last turn.

`datasets` streams the dataset, from the Hub or from local files, so only what is used is fetched.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.data.rows import check_local, read_dataset

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
