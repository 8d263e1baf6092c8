"""Stage trim: beside the whole draft one whose head scores the most frequent tokens only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.stages.runner import Run

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path) -> dict[str, Any]:
    """Write the newest draft again, with ``trimmed_head.json``; say what the trimming costs."""
    from fastdraft_hf.recipe import trim_sets
    from fastdraft_hf.tune.texts import texts_of
    from fastdraft_hf.tune.trim import sentences, trim_into

    config = run.recipe.trim
    assert config is not None  # the stage is planned only with its section
    rows = [run.stage_folder("generate") / name for name in trim_sets(run.recipe)]
    texts = config.texts
    if texts:
        try:
            texts_of(rows, texts, run.recipe.seed)
        except FastDraftError as error:  # a few rows, or all of them greedy
            logger.warning("trim: acceptance is not measured: %s", error)
            texts = 0
    facts = trim_into(
        run.latest_model(),
        rows,
        config.draft_vocab,
        folder,
        target=run.target.path,
        texts=texts,
        num_assistant_tokens=run.recipe.evaluate.gammas[0],
        seed=run.recipe.seed,
    )
    for line in sentences(facts):
        logger.info("trim: %s", line)
    return facts


def check(run: Run) -> None:
    """Refuse a size that the target's vocabulary cannot have; before any work, for it comes late.

    Raises:
        FastDraftError: naming ``trim.draft_vocab``.
    """
    from fastdraft_hf.tune.trim import check_size

    assert run.recipe.trim is not None
    try:
        check_size(run.look_at_target().path, run.recipe.trim.draft_vocab)
    except FastDraftError as error:
        message = str(error)
        where = "trim." if message.startswith("draft_vocab") else ""
        raise FastDraftError(f"{where}{message}") from None
