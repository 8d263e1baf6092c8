"""From a recipe's sources to blocks of token ids, and to prompt-completion rows.

Both come out as lists of ``input_ids`` and ``labels`` of equal length (labels are -100 where no
loss is taken), which the trainer's own collator pads and stacks.
"""

from __future__ import annotations

import glob
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import python_source
from fastdraft_hf.data.config import Source
from fastdraft_hf.data.filters import read_kept_rows
from fastdraft_hf.data.prompts import free_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100

Example = dict[str, list[int]]


def check_source(source: Source, path: str, generated_sets: Iterable[str]) -> None:
    """Raise `FastDraftError` naming ``path`` when a source cannot exist; reads nothing."""
    if source.kind == "generated":
        known = list(generated_sets)
        if source.name not in known:
            raise FastDraftError(
                f"{path}.name: generate has no set '{source.name}'; it has: "
                f"{', '.join(known) or 'none'}"
            )
    elif source.kind == "files" and not glob.glob(source.name, recursive=True):
        raise FastDraftError(f"{path}.name: no file matches '{source.name}'")


def documents(source: Source) -> Iterator[str]:
    """Yield the texts of a source that is not generated."""
    if source.kind == "python":
        yield from python_source.documents()
    elif source.kind == "files":
        for name in sorted(glob.glob(source.name, recursive=True)):
            yield from _file_documents(Path(name), source.column)
    elif source.kind == "hub":
        import datasets

        try:
            stream = datasets.load_dataset(
                source.name, source.subset, split=source.split, streaming=True
            )
        except (OSError, ValueError) as error:  # not found, no network, no such split
            reason = str(error).strip().splitlines()[0]
            raise FastDraftError(f"source hub '{source.name}': {reason}") from error
        for row in stream:
            yield _column(row, source.column, source.name)
    else:
        raise ValueError(f"{source.kind} holds no documents")


def _file_documents(path: Path, column: str) -> Iterator[str]:
    if path.is_dir():
        return
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise FastDraftError(f"{path}:{number}: no valid JSON ({error})") from error
                yield _column(row, column, str(path))
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield _column(row, column, str(path))
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def _column(row: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(row.get(column), str):
        raise FastDraftError(
            f"{where}: column '{column}' is missing or no text; it has: {', '.join(row)}"
        )
    return str(row[column])


def _token_documents(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    generated: Path,
    overlaps: Callable[[str], bool],
    counts: dict[str, int],
    rng: random.Random,
) -> Iterator[list[int]]:
    """Yield one pass over a source as token ids, each document opened by the separator."""
    if source.kind == "generated":
        rows, _ = read_kept_rows(generated / source.name)
        rng.shuffle(rows)
        for row in rows:
            # With its prompt: the tasks may have been named after the set was written.
            if overlaps(tokenizer.decode(row["prompt_ids"] + row["completion_ids"])):
                counts["overlaps held-out text"] += 1
                continue
            counts["documents"] += 1
            yield row["prompt_ids"] + row["completion_ids"]
        return
    separator = list(free_prefix(tokenizer))
    texts: Iterable[str] = documents(source)
    if source.kind != "hub":  # a Hub stream is taken in order, local text fits in memory
        listed = list(texts)
        rng.shuffle(listed)
        texts = listed
    for text in texts:
        if overlaps(text):
            counts["overlaps held-out text"] += 1
            continue
        counts["documents"] += 1
        yield separator + tokenizer(text, add_special_tokens=False)["input_ids"]


def pack_blocks(documents: Iterable[Sequence[int]], length: int, count: int) -> Iterator[list[int]]:
    """Concatenate documents and cut the stream into ``count`` blocks of ``length`` ids.

    Every id appears once and in order; what is left at the end is dropped. Fewer blocks come
    when the documents end early.
    """
    buffer: list[int] = []
    made = 0
    for document in documents:
        buffer.extend(document)
        while len(buffer) >= length:
            if made == count:
                return
            yield buffer[:length]
            made += 1
            del buffer[:length]


def build_blocks(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    generated: Path,
    overlaps: Callable[[str], bool],
    max_tokens: int,
    length: int,
    seed: int,
    on_block: Callable[[], None] = lambda: None,
) -> tuple[list[Example], dict[str, Any]]:
    """Return shuffled blocks of ``length`` ids, ``max_tokens`` in all, by the sources' weights.

    A source that runs out is read again from its start, in another order; the summary says how
    often (``passes``).

    Returns:
        the blocks as examples, and a summary per source.
    """
    blocks: list[Example] = []
    summary: dict[str, Any] = {}
    total = sum(source.weight for source in sources)
    for number, source in enumerate(sources):
        rng = random.Random(f"{seed}-{number}")
        wanted = max(1, round(max_tokens / length * source.weight / total))
        counts = {"documents": 0, "overlaps held-out text": 0}
        passes = 0

        def endless(
            source: Source = source,
            rng: random.Random = rng,
            counts: dict[str, int] = counts,
        ) -> Iterator[list[int]]:
            nonlocal passes
            while True:
                passes += 1
                before = counts["documents"]
                yield from _token_documents(source, tokenizer, generated, overlaps, counts, rng)
                if counts["documents"] == before:
                    raise FastDraftError(
                        f"source {source.kind} '{source.name}': it gave no text to train on"
                    )

        made = 0
        for block in itertools.islice(pack_blocks(endless(), length, wanted), wanted):
            blocks.append({"input_ids": block, "labels": block})
            made += 1
            on_block()
        summary[_summary_key(summary, source)] = {
            "tokens": made * length,
            "passes": passes,
            **counts,
        }
    random.Random(seed).shuffle(blocks)
    return blocks, summary


def build_completions(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    generated: Path,
    overlaps: Callable[[str], bool],
    max_length: int,
    seed: int,
) -> tuple[list[Example], list[tuple[str, int]], dict[str, Any]]:
    """Return the target's answers as examples whose labels cover the completion only.

    The ids are those the target emitted. A row is cut at ``max_length``; one whose prompt alone
    fills it is dropped and counted.

    Returns:
        the examples; for each the set and the index of the row it was; and a summary per source.
    """
    examples: list[tuple[Example, tuple[str, int]]] = []
    summary: dict[str, Any] = {}
    for source in sources:
        if source.kind != "generated":
            raise FastDraftError(
                f"align: source '{source.name or source.kind}' is {source.kind}; alignment reads "
                "what the target wrote (kind: generated)"
            )
        rows, reasons = read_kept_rows(generated / source.name)
        made = 0
        for row in rows:
            prompt, completion = row["prompt_ids"], row["completion_ids"]
            if len(prompt) >= max_length:
                reasons["prompt too long"] += 1
                continue
            if overlaps(tokenizer.decode(prompt + completion)):
                reasons["overlaps held-out text"] += 1
                continue
            ids = (prompt + completion)[:max_length]
            labels = ([IGNORED] * len(prompt) + completion)[:max_length]
            example = {"input_ids": ids, "labels": labels}
            examples.append((example, (source.name, row["index"])))
            made += len(ids) - len(prompt)
        summary[_summary_key(summary, source)] = {"completion_tokens": made, **reasons}
    random.Random(seed).shuffle(examples)
    return [example for example, _ in examples], [row for _, row in examples], summary


def _summary_key(summary: dict[str, Any], source: Source) -> str:
    """Return the source's name, numbered when another source of that name came before."""
    name = source.name or source.kind
    again = sum(key == name or key.startswith(f"{name} #") for key in summary)
    return f"{name} #{again + 1}" if again else name
