"""Prompts of any dataset: a column of texts, or of chats up to the user's last turn.

`datasets` streams the dataset, from the Hub or from local files, so only what is used is fetched.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError, nearest

if TYPE_CHECKING:
    from fastdraft_hf.data.config import GeneratedSet

# Suffix of a local file -> its reader in `datasets`.
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
# Columns to look for if none is named; the first that exists is used.
PROMPT_COLUMNS = (
    *("messages", "conversations", "conversation"),
    *("prompt", "instruction", "question", "text"),
)
# Rows shuffled at a time: sorted datasets are common, and a stream has no random access.
SHUFFLED = 10_000

# The two common forms of a turn, and the speakers' names in the second.
_FORMS = (("role", "content"), ("from", "value"))
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "assistant"),
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


def no_column(
    setting: str, dataset: str | None, column: str, row: dict[str, Any]
) -> FastDraftError:
    """Return the error for a column that a row does not have."""
    return FastDraftError(
        f"{setting}: {dataset} has no column '{column}'{nearest(column, row)}; it has: "
        f"{', '.join(row)}"
    )


def prompt_column(wanted: GeneratedSet) -> str:
    """Read the first row of a set's dataset and return the column of the prompt.

    Raises:
        FastDraftError: the dataset cannot be read, is empty, or has no column of prompts.
    """
    first = next(_rows(wanted), None)
    if first is None:
        raise FastDraftError(f"dataset: {wanted.dataset} has no rows ({wanted.split})")
    column = wanted.column or next((name for name in PROMPT_COLUMNS if name in first), None)
    if column is None:
        raise FastDraftError(
            f"column: {wanted.dataset} has none of {', '.join(PROMPT_COLUMNS)}; name one of its "
            f"columns: {', '.join(first)}"
        )
    if column not in first:
        raise no_column("column", wanted.dataset, column, first)
    for name in wanted.context_columns:
        if name not in first:
            raise no_column("context_columns", wanted.dataset, name, first)
    if wanted.context_columns and isinstance(first[column], list):
        raise FastDraftError(
            f"context_columns: '{column}' holds chats; they need a column of texts"
        )
    if not isinstance(first[column], (str, list)):
        raise FastDraftError(
            f"column: '{column}' of {wanted.dataset} holds neither text nor chat messages but "
            f"{type(first[column]).__name__}; it has: {', '.join(first)}"
        )
    return column


def conversations(wanted: GeneratedSet, seed: int, counts: Counter[str]) -> Iterator[Conversation]:
    """Yield the chat of each row up to the user's last turn, shuffled by ``seed`` (`SHUFFLED`).

    A text is one turn of the user. Rows without a prompt are counted: ``empty``, ``no user
    turn``, ``no chat`` (unknown roles or forms, or content that is not text).

    Raises:
        FastDraftError: the dataset cannot be read, is empty, or has no column of prompts.
    """
    column = prompt_column(wanted)
    rows, source = _rows(wanted), random.Random(seed)
    # The shuffle of `datasets` streams (5.0) sleeps for seconds at the end of a parquet file.
    while chunk := list(itertools.islice(rows, SHUFFLED)):
        source.shuffle(chunk)
        for row in chunk:
            value = row.get(column)
            if isinstance(value, str) and value.strip():
                more = (str(row.get(name) or "").strip() for name in wanted.context_columns)
                value = "\n\n".join([value.strip(), *filter(None, more)])
            turns = conversation(value)
            if isinstance(turns, str):
                counts[turns] += 1
            else:
                yield turns


def _rows(wanted: GeneratedSet) -> Iterator[dict[str, Any]]:
    assert wanted.dataset is not None  # checked by the settings
    check_local(wanted.dataset, "dataset")
    return read_dataset(
        wanted.dataset,
        wanted.name,
        wanted.split,
        wanted.revision,
        where="dataset",
        advice="check the id, the network and that it needs no gate, or name a local copy",
    )


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
    turns = read_turns(value)
    if turns is None:
        return "no chat"
    asked = turns[: questions_end(turns)]
    if not asked:
        return "no user turn"
    return asked if asked[-1][1].strip() else "empty"


def read_turns(value: Any) -> Conversation | None:
    """Return the turns of a chat as (role, content), or ``None`` if it is not a chat of texts."""
    turns = [_turn(turn) for turn in value] if isinstance(value, list) else [None]
    whole = tuple(turn for turn in turns if turn is not None)
    return whole if len(whole) == len(turns) else None


def questions_end(turns: Conversation) -> int:
    """Return the number of turns up to the user's last, 0 without one."""
    return max((number for number, (role, _) in enumerate(turns, 1) if role == "user"), default=0)


def _turn(turn: Any) -> tuple[str, str] | None:
    for speaker, words in _FORMS if isinstance(turn, dict) else ():
        # A table gives every row the columns of all; missing ones are None.
        if turn.get(speaker) is not None and turn.get(words) is not None:
            role, content = _ROLES.get(turn[speaker]), turn[words]
            if isinstance(content, list) and all(
                isinstance(part, dict) and part.get("type") == "text" and "text" in part
                for part in content
            ):
                content = "".join(str(part["text"]) for part in content)
            return (role, content) if role is not None and isinstance(content, str) else None
    return None
