"""Stages pretrain, continue and align: one training loop over different text."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.corpora import build_blocks, build_completions
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.drafts.vocabulary import check_same_vocabulary
from fastdraft_hf.pipeline.recipe import resolve_device
from fastdraft_hf.pipeline.run import Run
from fastdraft_hf.training.config import TrainConfig

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
    """FT: cross-entropy on the target's own answers (sequence-level knowledge distillation)."""
    assert run.recipe.align is not None
    return _train(run, folder, "align", run.recipe.align)


def _train(run: Run, folder: Path, name: str, config: TrainConfig) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from fastdraft_hf.training.loop import train

    start_model = run.latest_model(before=name)
    tokenizer = AutoTokenizer.from_pretrained(start_model)
    check_same_vocabulary(AutoTokenizer.from_pretrained(run.target.path), tokenizer, start_model)
    data, trained = folder / "data", folder / "facts.json"
    if not trained.exists():
        if not data.exists():
            _prepare(run, data, name, config, tokenizer)
        summary = json.loads((data / "summary.json").read_text(encoding="utf-8"))
        logger.info("%s: data %s", name, summary)
        facts = train(
            start_model,
            tokenizer,
            data,
            folder / "work",
            config,
            seed=run.recipe.seed,
            device=resolve_device(run.recipe.device),
            label=name,
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


def _prepare(
    run: Run, data: Path, name: str, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the stage's examples as two data sets, so that a resumed run reads the same ones."""
    import datasets

    generated = run.stage_folder("generate")
    overlaps = Decontaminator.of_task_sets().overlaps
    if name == "align":
        examples, summary = build_completions(
            config.sources,
            tokenizer,
            generated=generated,
            overlaps=overlaps,
            max_length=config.seq_length,
            seed=run.recipe.seed,
        )
    else:
        wanted = config.max_train_tokens // config.seq_length + config.eval_sequences
        with Progress(f"{name}: read and tokenise", wanted, "blocks") as progress:
            examples, summary = build_blocks(
                config.sources,
                tokenizer,
                generated=generated,
                overlaps=overlaps,
                max_tokens=wanted * config.seq_length,
                length=config.seq_length,
                seed=run.recipe.seed,
                on_block=progress.advance,
            )
    if not examples:
        raise FastDraftError(f"{name}.sources: nothing is left to train on ({summary})")
    held_out = min(config.eval_sequences, len(examples) // 5)
    with atomic_folder(data) as temporary:
        for split, rows in (("eval", examples[:held_out]), ("train", examples[held_out:])):
            if rows:
                datasets.Dataset.from_list(rows).save_to_disk(str(temporary / split))
        write_json(temporary / "summary.json", {"sources": summary, "examples": len(examples)})
