"""Trims a trained draft's head and says what that costs: coverage and expected acceptance."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.filters import read_kept_rows
from fastdraft_hf.data.shards import MANIFEST
from fastdraft_hf.draft.reduced_vocabulary import (
    ReducedVocabulary,
    choose_token_ids,
    read_reduced_vocabulary,
    write_reduced_vocabulary,
)
from fastdraft_hf.eval.expected import (
    TextAcceptance,
    expected_rounds,
    rounds_acceptance_rate,
)
from fastdraft_hf.eval.metrics import bootstrap
from fastdraft_hf.tune.texts import MAX_NEW_TOKENS, Reader, held_out, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What a stage writes beside the draft and what is no part of it.
_NOT_COPIED = ("facts.json", "log.json", "provenance.json", "config.yaml", "*.tmp", "work", "data")


def special_ids(tokenizer: PreTrainedTokenizerBase, *folders: Path) -> set[int]:
    """Return the ids that stay whatever their count: special, added and end tokens.

    Args:
        tokenizer: the target's.
        *folders: of target and draft; their generation configs name end tokens.
    """
    found = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for folder in folders:
        path = folder / "generation_config.json"
        if path.exists():
            ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return {int(token) for token in found}


def check_size(target: Path, size: int) -> None:
    """Raise unless a head of ``size`` tokens can be: checked before a draft is made for it.

    Raises:
        FastDraftError: naming ``draft_vocab_size``.
    """
    from transformers import AutoConfig, AutoTokenizer

    vocabulary = AutoConfig.from_pretrained(target).get_text_config().vocab_size
    choose_token_ids(
        {}, special_ids(AutoTokenizer.from_pretrained(target), target), size, vocabulary
    )


def reduce_head(
    draft: Path,
    rows: Sequence[Path],
    size: int,
    output: Path,
    *,
    target: Path,
    texts: int = 24,
    num_assistant_tokens: int = 3,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``output``: the draft, and the ids that its reduced vocabulary scores.

    Args:
        draft, rows, size, target, texts, num_assistant_tokens, seed: see `reduce_into`.
        output: the folder to make; it must not exist.
        provenance: written beside the draft with the facts, if given.

    Returns:
        facts: see `reduce_into`.

    Raises:
        FastDraftError: a folder is not what it should be, or the size cannot be.
    """
    if output.exists():
        raise FastDraftError(f"output_dir: {output} exists; delete it or name another")
    with atomic_folder(output) as temporary:
        facts = reduce_into(
            draft,
            rows,
            size,
            temporary,
            target=target,
            texts=texts,
            num_assistant_tokens=num_assistant_tokens,
            seed=seed,
        )
        if provenance is not None:
            write_json(temporary / "provenance.json", {**provenance, "facts": facts})
    return facts


def reduce_into(
    draft: Path,
    rows: Sequence[Path],
    size: int,
    folder: Path,
    *,
    target: Path,
    texts: int = 24,
    num_assistant_tokens: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Fill a folder with the draft, and the ids that its reduced vocabulary scores.

    The ids are the most frequent ones of the target's own completions; special and end tokens
    always stay. One row in five is not counted: coverage and acceptance are of those.

    Args:
        draft: the trained draft's folder; it is copied whole, so stock engines read a full head.
        rows: folders of sets that the target wrote.
        size: tokens to keep, K.
        folder: what lies there of an earlier, killed call is written over.
        target: the target's folder.
        texts: held-out texts that acceptance is read from; 0 leaves that out.
        num_assistant_tokens: γ of the acceptance rate.
        seed: draws the texts.

    Returns:
        facts: ``coverage`` of held-out tokens (``None`` if there are none) and, from texts,
        ``acceptance_rate`` full and reduced and their ``difference``, each with a 95% interval
        over texts.

    Raises:
        FastDraftError: a folder is not what it should be, or the size cannot be; nothing is
            written then.
    """
    from transformers import AutoConfig, AutoTokenizer

    from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary

    if not (draft / "config.json").is_file() or not any(draft.glob("*.safetensors")):
        raise FastDraftError(f"draft: {draft} is no folder of a PyTorch draft")
    if read_reduced_vocabulary(draft) is not None:
        raise FastDraftError(f"draft: the head of {draft} is reduced already; trim the original")
    if not rows:
        raise FastDraftError("rows: folders of text that the target wrote are needed")
    for place in rows:
        if not (place / MANIFEST).is_file():
            raise FastDraftError(f"rows: {place} is no finished set of generated text")
    tokenizer = AutoTokenizer.from_pretrained(target)
    check_vocabulary(Vocabulary.of_folder(target, "the target", tokenizer), draft, "draft")
    vocabulary = AutoConfig.from_pretrained(draft).get_text_config().vocab_size

    counts, measured = _counts(rows)
    always = special_ids(tokenizer, target, draft)
    ids = choose_token_ids(counts, always, size, vocabulary)
    kept = set(ids)
    total = sum(measured.values())
    covered = sum(n for token, n in measured.items() if token in kept)
    facts: dict[str, Any] = {
        "draft_vocab_size": size,
        "vocabulary": vocabulary,
        "counted_tokens": sum(counts.values()),
        "counted_different_tokens": len(counts),
        "rows": [str(place) for place in rows],
        "held_out_tokens": total,
        "coverage": covered / total if total else None,
    }
    chosen = texts_of(rows, texts, seed) if texts else []
    ignored = shutil.ignore_patterns(*_NOT_COPIED)
    shutil.copytree(draft, folder, ignore=ignored, dirs_exist_ok=True)
    write_reduced_vocabulary(folder, ReducedVocabulary(tuple(ids), facts))
    if chosen:
        full, reduced = Reader(target, chosen).read(draft, folder)
        facts |= acceptance_cost(full, reduced, num_assistant_tokens)
        write_reduced_vocabulary(folder, ReducedVocabulary(tuple(ids), facts))
    return facts


def _counts(rows: Sequence[Path]) -> tuple[Counter[int], Counter[int]]:
    """Return how often each id was written, in rows that are counted and in held-out ones."""
    counts, measured = Counter[int](), Counter[int]()
    for place in rows:
        for row in read_kept_rows(place)[0]:
            (measured if held_out(row["index"]) else counts).update(row["completion_ids"])
    if not counts:
        raise FastDraftError("rows: they hold no text")
    return counts, measured


def acceptance_cost(
    full: Sequence[TextAcceptance], reduced: Sequence[TextAcceptance], num_assistant_tokens: int
) -> dict[str, Any]:
    """Return expected acceptance rates [value, low, high] of both heads, and the difference."""
    pairs = [
        tuple(expected_rounds(text, num_assistant_tokens, MAX_NEW_TOKENS) for text in both)
        for both in zip(full, reduced, strict=True)
    ]

    def rate(which: int) -> Any:
        return lambda chosen: rounds_acceptance_rate([pair[which] for pair in chosen])

    def difference(chosen: Any) -> float:
        return float(rate(1)(chosen) - rate(0)(chosen))

    return {
        "num_assistant_tokens": num_assistant_tokens,
        "texts": len(pairs),
        "acceptance_rate": {
            "full": bootstrap(pairs, rate(0)).triple(),
            "reduced": bootstrap(pairs, rate(1)).triple(),
            "difference": bootstrap(pairs, difference).triple(),
        },
    }


def sentences(facts: dict[str, Any]) -> list[str]:
    """Return what the facts say, in words."""
    lines = [f"head: {facts['draft_vocab_size']:,} of {facts['vocabulary']:,} tokens"]
    if facts["coverage"] is not None:
        lines[0] += (
            f"; they cover {facts['coverage']:.2%} of {facts['held_out_tokens']:,} tokens that "
            "were not counted"
        )
    rates = facts.get("acceptance_rate")
    if rates:
        words = {k: f"{v[0]:.3f} ({v[1]:.3f} to {v[2]:.3f})" for k, v in rates.items()}
        lines.append(
            f"expected acceptance rate at γ = {facts['num_assistant_tokens']} over "
            f"{facts['texts']} texts: {words['full']} with the full head, {words['reduced']} "
            f"reduced; difference {words['difference']}"
        )
    return lines
