"""Reduce a trained draft's vocabulary, and measure the cost: coverage and expected acceptance."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.filters import read_kept_rows
from fastdraft_hf.draft.reduced_vocabulary import (
    ReducedVocabulary,
    choose_token_ids,
    read_reduced_vocabulary,
    write_reduced_vocabulary,
)
from fastdraft_hf.eval.expected import TextAcceptance, expected_rounds
from fastdraft_hf.eval.metrics import acceptance_rate, bootstrap
from fastdraft_hf.target.resolve import all_end_ids, load_tokenizer
from fastdraft_hf.tune.texts import MAX_NEW_TOKENS, held_out, read_acceptance, sampled_completions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files of a stage that do not belong to the draft.
_NOT_COPIED = ("facts.json", "log.json", "provenance.json", "config.yaml", "*.tmp", "work", "data")


def special_ids(tokenizer: PreTrainedTokenizerBase, *folders: Path) -> set[int]:
    """Return the ids that always stay: special and added tokens, and the folders' end tokens."""
    found = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return found.union(*(all_end_ids(folder, tokenizer) for folder in folders))


def check_size(target: Path, size: int) -> None:
    """Raise `FastDraftError` unless the target's vocabulary can be reduced to ``size`` tokens."""
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(target).get_text_config().vocab_size
    tokenizer = load_tokenizer(target, "target")
    choose_token_ids({}, special_ids(tokenizer, target), size, vocabulary)


def reduce_draft(
    draft: Path,
    sets: Sequence[Path],
    size: int,
    folder: Path,
    *,
    target: Path,
    texts: int = 24,
    num_assistant_tokens: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Fill a folder with the draft and the ids that its reduced vocabulary scores.

    The ids are the most frequent ones of the target's completions; special and end tokens always
    stay. One row in five is not counted: coverage and acceptance are measured on those.

    Args:
        draft: folder of the trained draft. It is copied unchanged, so that other engines read a
            full head.
        sets: folders of generated sets.
        size: K, tokens to keep.
        folder: output; files of an earlier, killed call are overwritten.
        target: the target's folder.
        texts: held-out completions that acceptance is measured on; 0 for none.
        num_assistant_tokens: γ of the acceptance rate.
        seed: draws the completions.

    Returns:
        facts: ``coverage`` of held-out tokens (``None`` if there are none) and, with texts,
        ``acceptance_rate`` with the full and the reduced head and their ``difference``, each with
        a 95% interval over texts.

    Raises:
        FastDraftError: a folder is not what it should be, or the size is impossible; nothing is
            written then.
    """
    from transformers import AutoConfig

    from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary

    if not (draft / "config.json").is_file() or not any(draft.glob("*.safetensors")):
        raise FastDraftError(f"draft: {draft} is not a folder of a PyTorch draft")
    if read_reduced_vocabulary(draft) is not None:
        raise FastDraftError(
            f"draft: the vocabulary of {draft} is reduced already; use the full one"
        )
    tokenizer = load_tokenizer(target, "target")
    check_vocabulary(Vocabulary.of_folder(target, "the target", tokenizer), draft, "draft")
    vocabulary = AutoConfig.from_pretrained(draft).get_text_config().vocab_size

    counts, measured = Counter[int](), Counter[int]()
    for rows in sets:
        for row in read_kept_rows(rows)[0]:
            (measured if held_out(row["index"]) else counts).update(row["completion_ids"])
    if not counts:
        raise FastDraftError("reduced_vocabulary: the generated sets hold no completions")
    ids = choose_token_ids(counts, special_ids(tokenizer, target, draft), size, vocabulary)
    total, covered = measured.total(), sum(measured[token] for token in ids)
    facts: dict[str, Any] = {
        "draft_vocab_size": size,
        "vocabulary": vocabulary,
        "counted_tokens": counts.total(),
        "counted_different_tokens": len(counts),
        "held_out_tokens": total,
        "coverage": covered / total if total else None,
    }
    chosen = sampled_completions(sets, texts, seed) if texts else []
    shutil.copytree(draft, folder, ignore=shutil.ignore_patterns(*_NOT_COPIED), dirs_exist_ok=True)
    write_reduced_vocabulary(folder, ReducedVocabulary(tuple(ids), facts))
    if chosen:
        full, reduced = read_acceptance(target, [draft, folder], chosen)
        facts |= acceptance_cost(full, reduced, num_assistant_tokens)
        write_reduced_vocabulary(folder, ReducedVocabulary(tuple(ids), facts))
    return facts


def acceptance_cost(
    full: Sequence[TextAcceptance], reduced: Sequence[TextAcceptance], num_assistant_tokens: int
) -> dict[str, Any]:
    """Return expected acceptance rates [value, low, high] of both heads, and the difference."""
    pairs = [
        tuple(expected_rounds(text, num_assistant_tokens, MAX_NEW_TOKENS) for text in both)
        for both in zip(full, reduced, strict=True)
    ]

    def rate(which: int, chosen: Any) -> float:
        return acceptance_rate([pair[which] for pair in chosen])

    return {
        "num_assistant_tokens": num_assistant_tokens,
        "texts": len(pairs),
        "acceptance_rate": {
            "full": bootstrap(pairs, lambda chosen: rate(0, chosen)).triple(),
            "reduced": bootstrap(pairs, lambda chosen: rate(1, chosen)).triple(),
            "difference": bootstrap(pairs, lambda c: rate(1, c) - rate(0, c)).triple(),
        },
    }


def sentences(facts: dict[str, Any]) -> list[str]:
    """Return the facts as sentences."""
    lines = [f"{facts['draft_vocab_size']:,} of {facts['vocabulary']:,} tokens"]
    if facts["coverage"] is not None:
        lines[0] += (
            f" cover {facts['coverage']:.2%} of {facts['held_out_tokens']:,} held-out tokens"
        )
    if rates := facts.get("acceptance_rate"):
        words = {k: f"{v[0]:.3f} ({v[1]:.3f} to {v[2]:.3f})" for k, v in rates.items()}
        lines.append(
            f"expected acceptance rate at γ = {facts['num_assistant_tokens']} over "
            f"{facts['texts']} completions: {words['full']} with the full head, "
            f"{words['reduced']} reduced; difference {words['difference']}"
        )
    return lines
