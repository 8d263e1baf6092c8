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
from fastdraft_hf.data.columns import distribution_table
from fastdraft_hf.data.corpora import IGNORED, Example, build_completions
from fastdraft_hf.data.decontaminate import Decontaminator
from fastdraft_hf.data.mixture import (
    plan_mixture,
    shared_tokens,
    summary_lines,
    tokenize_sources,
    wanted_tokens,
    write_mixture,
)
from fastdraft_hf.data.sources import token_shares
from fastdraft_hf.data.stream import BlockStream
from fastdraft_hf.data.target_logits import StoredLogits
from fastdraft_hf.data.token_shards import TokenShards
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.recipe import distribution_source, resolve_device
from fastdraft_hf.stages.runner import Run
from fastdraft_hf.train.config import TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Beside ``data``: shards that are nobody else's, kept over kills until the stage is finished.
OWN_TOKENS = "tokens"
# In ``data``: what a stream leaves out.
STREAM = "stream.json"


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
        if not data.exists():
            _prepare(run, data, name, config, own, stored=source == "stored")
        summary = json.loads((data / "summary.json").read_text(encoding="utf-8"))
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
            stream=_open_stream(run, data, config, own),
        )
        # Copied, not moved: killed in the middle of it, the next run copies again.
        shutil.copytree(folder / "work" / "model", folder, dirs_exist_ok=True)
        write_json(folder / "log.json", facts.pop("log"))
        write_json(trained, {"data": summary, "started_from": start_model.name, **facts})
    # From here on the checkpoints and the data are of no more use.
    for used in (folder / "work", data, folder / OWN_TOKENS):
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
    """Write what the stage reads, so that a resumed run reads the same.

    An alignment's examples are two datasets; packed text is a plan over token shards, or the
    hashes of what a stream leaves out; beside it the held-out blocks and a summary.
    """
    check = _held_out(run)
    if name == "align":
        _prepare_completions(run, data, config, tokenizer, check, stored=stored)
    elif config.streams:
        _prepare_stream(run, data, config, tokenizer, check)
    else:
        _prepare_blocks(run, data, name, config, tokenizer, check)


def _held_out(run: Run) -> Decontaminator:
    """Return the check that keeps out what evaluate and bench read."""
    return Decontaminator.of_task_sets(run.recipe.evaluate.tasks, run.recipe.bench.tasks)


def _prepare_completions(
    run: Run,
    data: Path,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    check: Decontaminator,
    *,
    stored: bool,
) -> None:
    import datasets

    examples, rows, summary = build_completions(
        config.sources,
        tokenizer,
        generated=run.stage_folder("generate"),
        overlaps=check.overlaps,
        max_length=config.max_length,
        seed=run.recipe.seed,
    )
    if not examples:
        raise FastDraftError(f"align.sources: nothing is left to train on ({summary})")
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
        write_json(temporary / "summary.json", {**facts, "held_out": check.held_out})


def _prepare_blocks(
    run: Run,
    data: Path,
    name: str,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    check: Decontaminator,
) -> None:
    """Tokenise what is not there yet, and decide which blocks are read."""
    blocks = _blocks(config)
    shards = tokenize_stage(run, name, config, tokenizer, check, own=data.with_name(OWN_TOKENS))
    plan, held_out, summary = plan_mixture(
        config.sources,
        shards,
        blocks=blocks,
        eval_blocks=config.eval_sequences,
        length=config.max_length,
        seed=run.recipe.seed,
    )
    with atomic_folder(data) as temporary:
        write_mixture(temporary, plan)
        _write_packed(temporary, held_out, summary, blocks, check)


def tokenize_stage(
    run: Run,
    name: str,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    check: Decontaminator,
    *,
    own: Path,
    processes: int | None = None,
) -> list[TokenShards]:
    """Return token shards of a stage's sources, enough for its budget; make what is missing.

    Args:
        run: whose generated sets are read.
        name: the stage's, for progress lines.
        config: its section.
        tokenizer: the target's.
        check: keeps held-out text out.
        own: folder of shards that no other run reads.
        processes: that tokenise; by default one a core.
    """
    wanted = wanted_tokens(
        config.sources, _blocks(config), config.eval_sequences, config.max_length
    )
    shared = shared_tokens(config)
    with Progress(f"{name}: tokenise", sum(wanted), "tokens") as progress:
        shards = tokenize_sources(
            config.sources,
            tokenizer,
            own=own,
            shared=shared,
            generated=run.stage_folder("generate"),
            overlaps=check.overlaps,
            held_out=check.held_out,
            wanted_tokens=wanted,
            processes=processes,
            on_tokens=progress.advance,
        )
    if shared is not None:  # what others wrote, perhaps long ago
        size = sum(s.files_bytes for s in shards)
        with Progress(f"{name}: check token shards", size, "bytes") as progress:
            for one in shards:
                one.verify(progress.advance)
    return shards


def _prepare_stream(
    run: Run,
    data: Path,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    check: Decontaminator,
) -> None:
    """Hold blocks out of the stream's beginning, and note what they were made of."""
    stream = BlockStream(
        config.sources,
        tokenizer,
        overlaps=check.overlaps,
        length=config.max_length,
        seed=run.recipe.seed,
        generated=run.stage_folder("generate"),
    )
    held_out, hashes, sample = stream.held_out(config.eval_sequences)
    blocks = _blocks(config)
    shares = token_shares([source.weight for source in config.sources], blocks)
    summary = {
        key: {
            "tokens": share * config.max_length,
            "bytes_per_token": seen["bytes_per_token"],
            # Of a stream nobody knows these before; the facts have what was read.
            "documents_estimated": _estimated(seen, share * config.max_length),
            "sample": seen,
        }
        for (key, seen), share in zip(sample.items(), shares, strict=True)
    }
    with atomic_folder(data) as temporary:
        write_json(temporary / STREAM, {"left_out": sorted(hashes)})
        _write_packed(temporary, held_out, summary, blocks, check)


def _estimated(sample: dict[str, Any], tokens: int) -> int | None:
    """Return how many documents so many tokens are, going by a sample."""
    seen = sample["bytes"] / max(sample["bytes_per_token"], 1e-9)
    return round(tokens * sample["documents"] / seen) if seen else None


def _write_packed(
    folder: Path,
    held_out: list[list[int]],
    summary: dict[str, Any],
    blocks: int,
    check: Decontaminator,
) -> None:
    import datasets

    if held_out:
        rows = [{"input_ids": block, "labels": block} for block in held_out]
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "eval"))
    facts = {"sources": summary, "examples": blocks + len(held_out)}
    write_json(folder / "summary.json", {**facts, "held_out": check.held_out})


def _open_stream(
    run: Run,
    data: Path,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> BlockStream | None:
    """Return the stream that was prepared in ``data``, if it is one."""
    if not (data / STREAM).exists():
        return None
    prepared = json.loads((data / STREAM).read_text(encoding="utf-8"))
    return BlockStream(
        config.sources,
        tokenizer,
        overlaps=_held_out(run).overlaps,
        length=config.max_length,
        seed=run.recipe.seed,
        generated=run.stage_folder("generate"),
        left_out=frozenset(prepared["left_out"]),
    )


def _blocks(config: TrainConfig) -> int:
    """Return the blocks of the whole budget: full steps, the last of which reaches it."""
    steps = -(-config.max_train_tokens // config.step_tokens)
    return steps * config.step_tokens // config.max_length


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
