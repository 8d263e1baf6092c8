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
from fastdraft_hf.data.corpora import IGNORED, Example, build_blocks, build_completions
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.stored_distribution import distribution_table
from fastdraft_hf.data.target_logits import StoredLogits
from fastdraft_hf.drafts.vocabulary import check_same_vocabulary
from fastdraft_hf.pipeline.recipe import distribution_source, resolve_device
from fastdraft_hf.pipeline.run import Run
from fastdraft_hf.training.config import TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset
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

    from fastdraft_hf.training.loop import train

    source = distribution_source(run.recipe, name)
    start_model = run.latest_model(before=name)
    tokenizer = AutoTokenizer.from_pretrained(start_model)
    check_same_vocabulary(AutoTokenizer.from_pretrained(run.target.path), tokenizer, start_model)
    data, trained = folder / "data", folder / "facts.json"
    if not trained.exists():
        if not data.exists():
            _prepare(run, data, name, config, tokenizer, stored=source == "stored")
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
            target=run.target.path if source == "online" else None,
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
    run: Run,
    data: Path,
    name: str,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stored: bool,
) -> None:
    """Write the stage's examples as two data sets, so that a resumed run reads the same ones."""
    import datasets

    generated = run.stage_folder("generate")
    held_out_texts = Decontaminator.of_task_sets(run.recipe.evaluate.tasks, run.recipe.bench.tasks)
    overlaps = held_out_texts.overlaps
    rows: list[tuple[str, int]] = []
    if name == "align":
        examples, rows, summary = build_completions(
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
        for split, part in (("eval", slice(held_out)), ("train", slice(held_out, None))):
            if not examples[part]:
                continue
            dataset = datasets.Dataset.from_list(examples[part])
            if stored:
                dataset = _with_distribution(
                    dataset, examples[part], rows[part], run.stage_folder("logits")
                )
            dataset.save_to_disk(str(temporary / split))
        facts = {"sources": summary, "examples": len(examples)}
        write_json(temporary / "summary.json", {**facts, "held_out": held_out_texts.held_out})


def _with_distribution(
    dataset: Dataset, examples: list[Example], rows: list[tuple[str, int]], folder: Path
) -> Dataset:
    """Add the columns of the stored distribution to the rows they belong to."""
    import datasets

    sets = {name: StoredLogits(folder / name) for name in dict.fromkeys(name for name, _ in rows)}
    parts = []
    for example, (name, index) in zip(examples, rows, strict=True):
        # A row may have been cut at its end; what is stored begins at the completion.
        labelled = sum(label != IGNORED for label in example["labels"][1:])
        ids, log_probs, tail = (part[:labelled] for part in sets[name].of_row(index))
        parts.append((len(example["input_ids"]), ids, log_probs, tail))
    temperature = next(iter(sets.values())).temperature
    table = datasets.table.InMemoryTable(distribution_table(parts, temperature))
    return datasets.concatenate_datasets([dataset, datasets.Dataset(table)], axis=1)
