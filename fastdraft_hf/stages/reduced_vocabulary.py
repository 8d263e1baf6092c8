"""Stage reduced_vocabulary: the draft's head scores the most frequent tokens only."""

import itertools
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.filters import iter_kept_rows
from fastdraft_hf.draft.families import read_parameters
from fastdraft_hf.draft.reduced_vocabulary import (
    check_size,
    load_draft,
    rank_tokens,
    read_reduced_vocabulary,
    write_reduced_vocabulary,
)
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.eval.metrics import expected_block_efficiency
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import all_end_ids, load_config, load_tokenizer

logger = logging.getLogger(__name__)

# Held-out tokens of each set in which the draft's right guesses are counted.
_READ = 10_000
_GAMMA = 3  # the paper's
_MULTIPLE = 64  # of the head's rows, for kernels
# A smaller head was no faster, on Gemma-3-270M or SmolLM2-135M, and lost accepted tokens.
LEAST = 16_384

# Files of a stage that do not belong to the draft.
_NOT_COPIED = ("facts.json", "log.json", "provenance.json", "config.yaml", "*.tmp", "work", "data")


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write the newest draft again, with ``reduced_vocabulary.json``; return its coverage."""
    config = run.recipe.reduced_vocabulary
    assert config is not None  # the stage is planned only with its section
    sets = [run.stage_folder("generate") / name for name in config.sets]
    draft = run.latest_model(before="reduced_vocabulary")
    facts = reduce_draft(draft, sets, config.draft_vocab_size, folder, target=run.target.path)
    logger.info(
        "reduced_vocabulary: %s of %s tokens cover %s of the held-out text",
        f"{facts['draft_vocab_size']:,}",
        f"{facts['vocabulary']:,}",
        "an unknown share" if facts["coverage"] is None else f"{facts['coverage']:.2%}",
    )
    return facts


def check(run: Run) -> None:
    """Refuse a size that the target's vocabulary cannot be reduced to, before any work.

    Raises:
        FastDraftError: naming ``reduced_vocabulary.draft_vocab_size``.
    """
    config, target = run.recipe.reduced_vocabulary, run.look_at_target().path
    assert config is not None
    if config.draft_vocab_size is None:
        return
    vocabulary = load_config(target, "target").get_text_config().vocab_size
    always = all_end_ids(target, load_tokenizer(target, "target"))
    try:
        check_size(config.draft_vocab_size, always, vocabulary)
    except FastDraftError as error:
        raise FastDraftError(f"reduced_vocabulary.{error}") from None


def reduce_draft(
    draft: Path, sets: Sequence[Path], size: int | None, folder: Path, *, target: Path
) -> dict[str, Any]:
    """Fill a folder with the draft and the ids that its reduced vocabulary scores.

    The ids are the most frequent ones of the target's completions; end tokens always stay. One row
    in five is not counted: coverage is measured on those.

    Args:
        draft: folder of the trained draft. It is copied unchanged, so that other engines read a
            full head.
        sets: folders of generated sets.
        size: K, tokens to keep; None: what `best_size` finds, which may be all of them.
        folder: output; files of an earlier, killed call are overwritten.
        target: the target's folder.

    Returns:
        facts; ``coverage`` is the share of held-out tokens that are kept, ``None`` without any.

    Raises:
        FastDraftError: before anything is written.
    """
    if read_reduced_vocabulary(draft) is not None:
        raise FastDraftError(
            f"draft: the vocabulary of {draft} is reduced already; use the full one"
        )
    tokenizer = load_tokenizer(target, "target")
    check_vocabulary(Vocabulary.of_folder(target, "the target", tokenizer), draft, "draft")
    config = load_config(draft, "draft")
    vocabulary = config.get_text_config().vocab_size
    counts, held_out, sample = Counter[int](), Counter[int](), list[dict[str, Any]]()
    for rows in sets:
        read = 0
        for row in iter_kept_rows(rows):
            (counts if row["index"] % 5 else held_out).update(row["completion_ids"])
            if row["index"] % 5 == 0 and read < _READ:
                sample.append(row)
                read += len(row["completion_ids"])
    if not counts:
        raise FastDraftError("reduced_vocabulary: the generated sets hold no completions")
    always = all_end_ids(target, tokenizer) | all_end_ids(draft, tokenizer)
    order, total = rank_tokens(counts, always, vocabulary), held_out.total()
    if size is None:
        right = _right_guesses(draft, sample)
        shares = [right.get(token, 0.0) for token in order]
        size = best_size(shares, load_config(target, "target"), config)
    else:
        check_size(size, always, vocabulary)
    kept = sorted(order[:size])
    shutil.copytree(draft, folder, ignore=shutil.ignore_patterns(*_NOT_COPIED), dirs_exist_ok=True)
    if size < vocabulary:
        write_reduced_vocabulary(folder, kept)
    return {
        "draft_vocab_size": len(kept),
        "vocabulary": vocabulary,
        "coverage": sum(held_out[token] for token in kept) / total if total else None,
    }


def best_size(right: Sequence[float], target: Any, draft: Any) -> int:
    """Return how many tokens the head should score for the most tokens per byte that is read.

    The expected block efficiency at γ = 3, over what the target's pass and three passes of the
    draft read; at least `LEAST`.

    Args:
        right: [vocabulary] by rank, the share of text in which the draft guesses the token right.
        target, draft: the models' configs.
    """
    vocabulary, width = len(right), int(draft.get_text_config().hidden_size)
    whole, layers = read_parameters(target), read_parameters(draft, scored=0)
    guessed = list(itertools.accumulate(right))

    def gain(size: int) -> float:
        read = whole + _GAMMA * (layers + size * width)
        return expected_block_efficiency(guessed[size - 1], _GAMMA) / read

    best: int = max([*range(LEAST, vocabulary, _MULTIPLE), vocabulary], key=gain)
    return best


def _right_guesses(draft: Path, rows: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Return by token the share of the rows' text in which the draft guesses it right."""
    model = load_draft(draft, dtype=torch.float32).eval()
    found, total = Counter[int](), sum(len(row["completion_ids"]) for row in rows)
    with Progress("reduced_vocabulary", total, "tokens") as progress, torch.inference_mode():
        for row in rows:
            text = torch.tensor([*row["prompt_ids"], *row["completion_ids"]])
            length = len(row["completion_ids"])
            guesses = model(text[None, :-1]).logits[0, -length:].argmax(-1)
            answer = text[1:][-length:]
            found.update(answer[guesses == answer].tolist())
            progress.advance(length)
    return {token: count / total for token, count in found.items()}
