"""Prompt-completion rows: what the target answered, as the examples an alignment trains on.

They come out as lists of ``input_ids`` and ``labels`` of equal length (labels are -100 where no
loss is taken), which the trainer's own collator pads and stacks. Packed text is made elsewhere:
`mixture`, `stream`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.filters import read_kept_rows
from fastdraft_hf.data.sources import Source, summary_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100

Example = dict[str, list[int]]


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
    for key, source in zip(summary_keys(sources), sources, strict=True):
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
        summary[key] = {"completion_tokens": made, **reasons}
    random.Random(seed).shuffle(examples)
    return [example for example, _ in examples], [row for _, row in examples], summary
