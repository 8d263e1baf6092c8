"""Prompts for the target: chats, the start of free text, Magpie, code, and any dataset's prompts.

`datasets` streams a dataset, from the Hub or from local files, so only what is used is fetched.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.data.installed import function_heads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft_hf.data.config import GeneratedSet

# The same wording for every code prompt, held out or trained on.
CODE_INSTRUCTION = "Complete this Python function:\n\n```python\n{}\n```"

Conversation = Sequence[tuple[str, str]]  # (role, content)
Prompts = list[tuple[int, ...]]

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
_ADVICE = "check the id, the network and that it is not gated, or set dataset to a local copy"
# Rows shuffled at a time: sorted datasets are common, and a stream has no random access.
SHUFFLED = 10_000

# The two common forms of a turn, and the speakers' names in the second.
_FORMS = (("role", "content"), ("from", "value"))
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model"), "assistant"),
    "system": "system",
}

# Messages with different starts and ends: the ids that all rendered chats share are the template's.
# None starts with a digit: some tokenizers split differently before one.
_PROBES = (
    "What is 5?",
    "Give me (x)",
    "日本語",
    "I am here.",
    '"Yes"',
    "Add 7 to 15",
    "élan vital!",
)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str | Conversation,
    system_prompt: str | None = None,
) -> tuple[int, ...]:
    """Return the ids of a chat up to the assistant's turn.

    Args:
        tokenizer: the target's. Without a chat template the chat is plain text.
        instruction: the user's message, or a conversation as (role, content).
        system_prompt: first turn of a conversation without a system turn.

    Raises:
        FastDraftError: the chat template refuses the conversation or drops the user's message, or
            there are several and none called default.
    """
    turns = [("user", instruction)] if isinstance(instruction, str) else list(instruction)
    if system_prompt is not None and all(role != "system" for role, _ in turns):
        turns = [("system", system_prompt), *turns]
    if tokenizer.chat_template is None:
        return tuple(tokenizer("\n\n".join(content for _, content in turns))["input_ids"])
    return tuple(tokenizer(_chat_text(tokenizer, turns), add_special_tokens=False)["input_ids"])


def _chat_text(tokenizer: PreTrainedTokenizerBase, turns: Conversation) -> str:
    """Render a conversation, its content as text or, as vision models read it, a list of parts."""
    for parts in (False, True):
        if "rivers" in _rendered(tokenizer, [("user", "rivers")], parts):
            return _rendered(tokenizer, turns, parts)
    raise FastDraftError("kind: the target's chat template drops the user's message")


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Conversation, parts: bool) -> str:
    messages = [
        {"role": role, "content": [{"type": "text", "text": content}] if parts else content}
        for role, content in turns
    ]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except ValueError as error:  # several templates and none called default
        raise FastDraftError(
            f"target: {error} Set tokenizer.chat_template to one of them and save the tokenizer"
        ) from error
    except Exception as error:  # a template is a program
        roles = ", ".join(role for role, _ in turns)
        raise FastDraftError(
            f"the target's chat template refuses a conversation of {roles} ({error})"
        ) from error


def template_ends(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of the chat template before the user's message, and those after it.

    Those after it end the user's turn and open the answer. Magpie (Xu et al. 2024, arXiv
    2406.08464) prompts the target with those before it, so that it continues as the user.

    They are the ids that chats with different messages share, so a space that belongs to a word's
    first token (``[INST] Hello``) is not among them.

    Raises:
        FastDraftError: there is no chat template, or nothing in it before the user's message.
    """
    if tokenizer.chat_template is None:
        raise FastDraftError(
            "kind: magpie needs a chat template, and the target's tokenizer has none; "
            "use kind: free"
        )
    chats = [chat_ids(tokenizer, words, system_prompt) for words in _PROBES]
    first, last = shared_ends(chats)
    if not first:
        raise FastDraftError(
            "kind: the target's chat template has nothing before the user's message, which magpie "
            "needs; use kind: free"
        )
    return chats[0][:first], chats[0][len(chats[0]) - last :]


def shared_ends(texts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return how many ids all texts share at their start, and how many of the rest at their end."""

    def shared(lists: Sequence[Sequence[int]]) -> int:
        columns = (set(column) for column in zip(*lists, strict=False))
        return sum(1 for _ in itertools.takewhile(lambda ids: len(ids) == 1, columns))

    first = shared(texts)
    return first, shared([ids[first:][::-1] for ids in texts])


def written_instruction(
    ids: Sequence[int], finish_reason: str, suffix: Sequence[int], special_ids: Set[int]
) -> tuple[int, ...] | None:
    """Return the instruction that the target generated, or ``None`` if it did not end.

    An instruction ends where the target stopped, or where it generated the template's own end of
    the turn: not every template ends the user's turn with a stop token (Mistral's ``[/INST]``).

    ``suffix`` is the second value of `template_ends`.
    """
    written = tuple(ids)
    # The whole suffix, or only its first token if that is special.
    end = tuple(suffix[:1] if suffix and suffix[0] in special_ids else suffix)
    if end:
        for position in range(len(written) - len(end) + 1):
            if written[position : position + len(end)] == end:
                return written[:position]
    return written[:-1] if finish_reason == "stop" else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of every special token, including those without a role such as EOS."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, what in added if what.special)}


def free_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what starts a document in pre-training: ``<|endoftext|>`` or BOS.

    The BOS of ChatML models is a turn marker; their documents were separated by ``<|endoftext|>``,
    so that is preferred if the vocabulary has it.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        return (vocabulary["<|endoftext|>"],)
    for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if special is not None:
            return (special,)
    raise FastDraftError("kind: free needs a tokenizer with BOS or EOS to start a document with")


def code_instructions(seed: int) -> list[str]:
    """Return a "complete this function" instruction for every documented standard function."""
    heads = sorted(set(function_heads()))
    random.Random(seed).shuffle(heads)
    return [CODE_INSTRUCTION.format(head.rstrip()) for head in heads]


def check_local(dataset: str, where: str) -> None:
    """Raise `FastDraftError` for a local path that does not exist or a file of unknown kind."""
    path = Path(dataset).expanduser()
    local = path.suffix in FORMATS or dataset.startswith((".", "/", "~"))
    if local and not path.exists():
        raise FastDraftError(f"{where}: no such file or folder: {dataset}")
    if path.is_file() and path.suffix not in FORMATS:
        raise FastDraftError(
            f"{where}: {dataset} has an unknown suffix; known: {', '.join(FORMATS)}"
        )


def read_dataset(
    dataset: str, name: str | None, split: str, revision: str | None, where: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset.

    Args:
        dataset: an id on the Hub, a file, a folder of files or one written by ``save_to_disk``.
        name: its configuration.
        where: the setting that names it, for errors (``"tasks.mine"``).

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
        empty = isinstance(error, StopIteration)
        reason = "it is empty" if empty else str(error).strip() or type(error).__name__
        reason = reason.splitlines()[0]
        what = "check the file" if path.exists() else _ADVICE
        raise FastDraftError(f"{where}: cannot read {dataset} ({reason}); {what}") from error


def no_column(
    setting: str, dataset: str | None, column: str, row: dict[str, Any]
) -> FastDraftError:
    """Return the error for a column that a row does not have."""
    return FastDraftError(
        f"{setting}: {dataset} has no column '{column}'{nearest(column, row)}; it has: "
        f"{', '.join(row)}"
    )


def conversations(wanted: GeneratedSet, seed: int, counts: Counter[str]) -> Iterator[Conversation]:
    """Yield the chat of each row up to the user's last turn, shuffled by ``seed`` (`SHUFFLED`).

    A text is one turn of the user. Rows without a prompt are counted: ``empty``, ``no user
    turn``, ``no chat`` (unknown roles or forms, or content that is not text).

    Raises:
        FastDraftError: the dataset cannot be read, is empty, or has no column of prompts.
    """
    dataset = str(wanted.dataset)
    check_local(dataset, "dataset")
    rows = read_dataset(dataset, wanted.name, wanted.split, wanted.revision, where="dataset")
    first = next(rows, None)
    if first is None:
        raise FastDraftError(f"dataset: {dataset} has no rows ({wanted.split})")
    column = _prompt_column(wanted, first)
    rows, source = itertools.chain([first], rows), random.Random(seed)
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


def _prompt_column(wanted: GeneratedSet, row: dict[str, Any]) -> str:
    """Return the column of the prompt; check it and the context columns in the first row."""
    column = wanted.column or next((name for name in PROMPT_COLUMNS if name in row), None)
    if column is None:
        raise FastDraftError(
            f"column: {wanted.dataset} has none of {', '.join(PROMPT_COLUMNS)}; name one of its "
            f"columns: {', '.join(row)}"
        )
    if column not in row:
        raise no_column("column", wanted.dataset, column, row)
    for name in wanted.context_columns:
        if name not in row:
            raise no_column("context_columns", wanted.dataset, name, row)
    if wanted.context_columns and isinstance(row[column], list):
        raise FastDraftError(
            f"context_columns: '{column}' holds chats; they need a column of texts"
        )
    if not isinstance(row[column], (str, list)):
        raise FastDraftError(
            f"column: '{column}' of {wanted.dataset} holds neither text nor chat messages but "
            f"{type(row[column]).__name__}; it has: {', '.join(row)}"
        )
    return column


def conversation(value: Any) -> Conversation | str:
    """Return a cell's chat up to the user's last turn, or the reason why it has none.

    Args:
        value: a text, or a list of turns with ``role`` and ``content``, or ``from`` and ``value``.
            Content may be a list of text parts.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value.strip()}]
    if not value:
        return "empty"
    found = [_turn(turn) for turn in value] if isinstance(value, list) else [None]
    turns = [turn for turn in found if turn is not None]
    if len(turns) < len(found):
        return "no chat"
    while turns and turns[-1][0] != "user":
        turns.pop()
    if not turns:
        return "no user turn"
    return tuple(turns) if turns[-1][1].strip() else "empty"


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
