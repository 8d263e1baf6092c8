"""Stage reduced_vocabulary: a second draft that scores the most frequent tokens only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.stages.run import Run

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write the newest draft again, with ``reduced_vocabulary.json``; return its cost."""
    from fastdraft_hf.tune.reduced_vocabulary import reduce_draft, sentences
    from fastdraft_hf.tune.texts import sampled_completions

    config = run.recipe.reduced_vocabulary
    assert config is not None  # the stage is planned only with its section
    sets = [run.stage_folder("generate") / name for name in config.sets]
    texts = config.texts
    if texts:
        try:
            sampled_completions(sets, texts, run.recipe.seed)
        except FastDraftError as error:  # few rows, or all of them greedy
            logger.warning("reduced_vocabulary: acceptance is not measured: %s", error)
            texts = 0
    facts = reduce_draft(
        run.latest_model(),
        sets,
        config.draft_vocab_size,
        folder,
        target=run.target.path,
        texts=texts,
        num_assistant_tokens=run.recipe.evaluate.gammas[0],
        seed=run.recipe.seed,
    )
    for line in sentences(facts):
        logger.info("reduced_vocabulary: %s", line)
    return facts


def check(run: Run) -> None:
    """Refuse a size that the target's vocabulary cannot be reduced to, before any work.

    Raises:
        FastDraftError: naming ``reduced_vocabulary.draft_vocab_size``.
    """
    from fastdraft_hf.tune.reduced_vocabulary import check_size

    assert run.recipe.reduced_vocabulary is not None
    try:
        check_size(run.look_at_target().path, run.recipe.reduced_vocabulary.draft_vocab_size)
    except FastDraftError as error:
        where = "reduced_vocabulary." if str(error).startswith("draft_vocab_size") else ""
        raise FastDraftError(f"{where}{error}") from None
