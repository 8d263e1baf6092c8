"""Stages pretrain, continue and align: one training loop over different text."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf.data.completions import open_completions
from fastdraft_hf.data.corpus import Corpus, open_corpus, summary_lines
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.recipe import distribution_source, resolve_device
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def pretrain(run: Run, folder: Path) -> dict[str, Any]:
    """PT: next-token training on packed blocks."""
    assert run.recipe.pretrain is not None
    return _train(run, folder, "pretrain", run.recipe.pretrain)


def continue_pretrain(run: Run, folder: Path) -> dict[str, Any]:
    """CP: the same on another mixture."""
    assert run.recipe.continue_ is not None
    return _train(run, folder, "continue", run.recipe.continue_)


def align(run: Run, folder: Path) -> dict[str, Any]:
    """FT: the target's own answers (sequence-level knowledge distillation), by any objective."""
    assert run.recipe.align is not None
    return _train(run, folder, "align", run.recipe.align)


def _train(run: Run, folder: Path, name: str, config: TrainConfig) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from fastdraft_hf.train.loop import train

    source = distribution_source(run.recipe, name)
    start_model = run.latest_model(before=name)
    tokenizer = AutoTokenizer.from_pretrained(start_model)
    # Text is tokenised by the target's own, so that shards of it serve every draft.
    own = AutoTokenizer.from_pretrained(run.target.path)
    check_vocabulary(
        Vocabulary.of_folder(run.target.path, "the target", own),
        Vocabulary.of_folder(start_model, tokenizer=tokenizer),
    )
    data, trained = folder / "data", folder / "facts.json"
    if not trained.exists():
        corpus: Corpus | None = None
        if name == "align":
            if not data.exists():
                _prepare_completions(run, data, config, own, stored=source == "stored")
            summary = json.loads((data / "summary.json").read_text(encoding="utf-8"))
        else:
            corpus = open_text(run, data, config, own)
            summary = corpus.summary
        for line in summary_lines(summary.get("sources", {})):
            logger.info("%s: %s", name, line)
        facts = train(
            start_model,
            tokenizer,
            data,
            folder / "work",
            config,
            seed=run.recipe.seed,
            device=resolve_device(run.recipe.device),
            label=name,
            target=run.target.path if source == "online" else None,
            corpus=corpus,
        )
        # Copied, not moved: killed in the middle of it, the next run copies again.
        shutil.copytree(folder / "work" / "model", folder, dirs_exist_ok=True)
        write_json(folder / "log.json", facts.pop("log"))
        write_json(trained, {"data": summary, "started_from": start_model.name, **facts})
    # From here on the checkpoints and the data are of no more use.
    for used in (folder / "work", data):
        if used.exists():
            shutil.rmtree(used)
    return dict(json.loads(trained.read_text(encoding="utf-8")))


def open_text(
    run: Run, folder: Path, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    """Return the packed text of a section; write it into ``folder`` where it is not there yet."""
    # Full steps, the last of which reaches the budget.
    steps = -(-config.max_train_tokens // config.step_tokens)
    return open_corpus(
        config.sources,
        tokenizer,
        folder=folder,
        tokens=steps * config.step_tokens,
        max_length=config.max_length,
        eval_rows=config.eval_sequences,
        seed=run.recipe.seed,
        generated=run.stage_folder("generate"),
        decontaminator=_held_out(run),
        streaming=config.streams,
    )


def _held_out(run: Run) -> Decontaminator:
    """Return the check that keeps out what evaluate and bench read."""
    return Decontaminator.of_task_sets(run.recipe.evaluate.tasks, run.recipe.bench.tasks)


def _prepare_completions(
    run: Run,
    data: Path,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stored: bool,
) -> None:
    check = _held_out(run)
    with atomic_folder(data) as temporary:
        train, evaluated, summary = open_completions(
            config.sources,
            folder=temporary / "rows",
            generated=run.stage_folder("generate"),
            logits=run.stage_folder("logits") if stored else None,
            tokenizer=tokenizer,
            decontaminator=check,
            max_length=config.max_length,
            eval_rows=config.eval_sequences,
            seed=run.recipe.seed,
        )
        train.save_to_disk(str(temporary / "train"))
        if evaluated is not None:
            evaluated.save_to_disk(str(temporary / "eval"))
        shutil.rmtree(temporary / "rows")
        examples = len(train) + (0 if evaluated is None else len(evaluated))
        facts = {"sources": summary, "examples": examples}
        write_json(temporary / "summary.json", {**facts, "held_out": check.held_out})
