"""Stages pretrain, continue and align: one training loop over different text, in every process."""

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft_hf._atomic import read_json, write_json
from fastdraft_hf._processes import barrier, is_main, on_main
from fastdraft_hf.data.columns import IGNORED
from fastdraft_hf.data.corpus import Corpus, open_completions, open_corpus, summary_lines
from fastdraft_hf.data.task_sets import Decontaminator
from fastdraft_hf.decode.settings import store_draft_settings
from fastdraft_hf.draft.reduced_vocabulary import load_draft
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.eval.expected import Continuation, fit_temperature_ratio
from fastdraft_hf.recipe import distribution_source, resolve_device
from fastdraft_hf.stages import deadline
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import load_tokenizer
from fastdraft_hf.train import loop
from fastdraft_hf.train.section import TrainingSection

logger = logging.getLogger(__name__)


def run(run: Run, folder: Path, name: str) -> dict[str, Any]:
    """Train the newest draft: ``pretrain`` and ``continue`` on text, ``align`` on completions."""
    section = run.recipe.training_stages()[name]
    start_model = run.latest_model(before=name)
    tokenizer = load_tokenizer(run.target.path, "target")
    vocabulary = Vocabulary.of_folder(run.target.path, "the target", tokenizer)
    check_vocabulary(vocabulary, start_model)
    data, trained = folder / "data", folder / "facts.json"
    if not on_main(trained.exists):
        corpus = open_rows(run, data, name, section, tokenizer)
        limit = on_main(lambda: deadline.minutes(run, name))
        facts = loop.train(
            start_model,
            folder / "work",
            section.model_copy(update={"max_minutes": limit}),
            train_dataset=corpus.train,
            eval_dataset=corpus.eval,
            stream=corpus.stream,
            tokenizer=load_tokenizer(start_model),
            seed=run.recipe.seed,
            device=resolve_device(run.recipe.device),
            label=name,
            teacher=run.target.path if distribution_source(run.recipe, name) == "online" else None,
        )
        if is_main():
            # Copied, not moved: if this is interrupted, the next run copies again.
            shutil.copytree(folder / "work" / "model", folder, dirs_exist_ok=True)
            for emissions in (folder / "work").glob("emissions.csv"):  # `report_to: codecarbon`
                shutil.copy(emissions, folder)
            if name == "align" and corpus.eval is not None:
                facts["draft_temperature"] = _fit_temperature(run, folder, corpus.eval)
            write_json(folder / "log.json", facts.pop("log"))
            write_json(trained, {"data": corpus.summary, "started_from": start_model.name, **facts})
        barrier()
    if is_main():
        for used in (folder / "work", data):  # checkpoints and data are no longer needed
            shutil.rmtree(used, ignore_errors=True)
    facts, wanted = dict(on_main(lambda: read_json(trained))), section.max_train_tokens
    if facts["max_train_tokens"] < wanted:
        facts["cut"] = [f"{facts['tokens']:,} of {wanted:,} tokens"]
    return facts


def _fit_temperature(run: Run, folder: Path, rows: Any) -> dict[str, float]:
    """Choose the draft's temperature on the rows held out from alignment, and store it."""
    device = resolve_device(run.recipe.device)
    pair = [load_draft(path, dtype="auto").to(device).eval() for path in (run.target.path, folder)]
    limit = run.recipe.training_stages()["align"].max_length
    texts = []
    for row in rows:
        start = next(n for n, label in enumerate(row["labels"]) if label != IGNORED)
        ids = row["input_ids"][:limit]
        texts.append(Continuation("align", tuple(ids[:start]), tuple(ids[start:])))
    temperature = (*run.recipe.evaluate.sampled, 1.0)[0]
    found = fit_temperature_ratio(pair[0], pair[1], texts, temperature)
    store_draft_settings(folder, temperature_ratio=found["temperature_ratio"])
    logger.info(
        "align: the draft samples at %.2f times the target's temperature (%g): expected acceptance "
        "of a token %.3f, at the same temperature %.3f",
        found["temperature_ratio"],
        temperature,
        found["acceptance"],
        found["acceptance_at_1"],
    )
    return found


def open_rows(
    run: Run, data: Path, name: str, section: TrainingSection, tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    """Return the rows to train on and to evaluate on.

    The main process prepares them in ``data`` once; all processes map them into memory.
    """
    check = Decontaminator.of_task_sets(run.recipe.evaluate.tasks, run.recipe.bench.tasks)
    common: dict[str, Any] = {
        "folder": data,
        "generated": run.stage_folder("generate"),
        "decontaminator": check,  # keeps out what evaluate and bench read
        "max_length": section.max_length,
        "eval_rows": section.eval_rows,
        "seed": run.recipe.seed,
    }
    if name == "align":
        stored = distribution_source(run.recipe, name) == "stored"
        logits = run.stage_folder("logits") if stored else None
        corpus = open_completions(section.sources, tokenizer=tokenizer, logits=logits, **common)
    else:
        # Full steps, the last of which reaches the budget.
        tokens = -(-section.max_train_tokens // section.step_tokens) * section.step_tokens
        corpus = open_corpus(
            section.sources, tokenizer, tokens=tokens, streaming=section.streams, **common
        )
    for line in summary_lines(corpus.summary["sources"]):
        logger.info("%s: %s", name, line)
    return corpus
