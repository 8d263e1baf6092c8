"""What the trainer refuses before any work, and how it opens the online teacher."""

from __future__ import annotations

import re
from typing import Any

import torch
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_of
from fastdraft_hf.data import columns
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.train.config import DraftDistillationConfig, has_fast_bf16
from fastdraft_hf.train.objectives import Objective


def check_stream(dataset: Any) -> None:
    """Refuse a streamed dataset without rows: it is repeated, and would never yield one.

    Raises:
        FastDraftError: the dataset is empty.
    """
    if isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None:
        raise FastDraftError("train dataset: it has no rows")


def named_sets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Return the datasets there are, by name."""
    several = isinstance(eval_dataset, dict)
    sets = {"train": train_dataset, **(eval_dataset if several else {"eval": eval_dataset})}
    return {name: dataset for name, dataset in sets.items() if dataset is not None}


def stores_distribution(sets: dict[str, Any]) -> bool:
    """Return whether the first of the datasets stores the teacher's distribution."""
    return any(columns.has_distribution(dataset, name) for name, dataset in sets.items())


def check_sources(
    objective: Objective,
    teacher_model: Any,
    sets: dict[str, Any],
    *,
    vocab_size: int,
    temperature: float,
) -> bool:
    """Return whether the teacher's distribution is stored in the datasets.

    Raises:
        FastDraftError: the objective needs a distribution and there is none, there are two sources
            of it, some datasets store it and some do not, or the columns are malformed.
    """
    stored = {name: columns.has_distribution(dataset, name) for name, dataset in sets.items()}
    if teacher_model is not None and any(stored.values()):
        raise FastDraftError(
            "both an online teacher and stored distributions: leave teacher_model out, or the "
            f"columns {', '.join(columns.LISTS)}"
        )
    if teacher_model is None and objective.needs_distribution:
        for name, has in stored.items():
            if not has:
                raise FastDraftError(
                    f"objective {objective} needs the target's distribution and the {name} "
                    f"dataset has no {', '.join(columns.LISTS)}: store them, give teacher_model, "
                    "or train with objective ce"
                )
    if len(set(stored.values())) > 1:
        raise FastDraftError(
            "some datasets store the target's distribution and some do not: "
            + ", ".join(f"{name} {'does' if has else 'does not'}" for name, has in stored.items())
        )
    if not any(stored.values()):
        return False
    for name, dataset in sets.items():
        columns.check_distribution(
            dataset, vocab_size=vocab_size, temperature=temperature, name=name
        )
    return True


def open_teacher(
    teacher: str | PreTrainedModel, args: DraftDistillationConfig, tokenizer: Any, vocab_size: int
) -> PreTrainedModel:
    """Load and freeze the online teacher.

    Args:
        teacher: the model, or its name or folder.
        args: the trainer's.
        tokenizer: the draft's.
        vocab_size: rows of the draft's head.

    Raises:
        FastDraftError: its vocabulary is not the draft's.
    """
    if isinstance(teacher, str):
        kwargs = args.teacher_model_init_kwargs
        given = dict(kwargs) if isinstance(kwargs, dict) else {}
        given.setdefault("trust_remote_code", args.trust_remote_code)
        given.setdefault("dtype", torch.bfloat16 if has_fast_bf16(args.device) else torch.float32)
        try:
            theirs = AutoTokenizer.from_pretrained(teacher)
        except (OSError, ValueError):
            theirs = None  # a teacher without a tokenizer: the heads are compared below
        if theirs is not None and tokenizer is not None:
            try:
                check_vocabulary(
                    Vocabulary.of_tokenizer(theirs, "the target"),
                    Vocabulary.of_tokenizer(tokenizer, "the draft"),
                )
            except FastDraftError as error:
                raise FastDraftError(f"teacher_model: {error}") from error
        teacher = AutoModelForCausalLM.from_pretrained(teacher, **given)
    rows = int(head_of(teacher).weight.shape[0])
    if rows != vocab_size:
        raise FastDraftError(
            f"teacher_model: its head has {rows} rows, the draft's {vocab_size}: different "
            "vocabularies"
        )
    teacher.requires_grad_(False)
    return teacher.to(args.device).eval()


def check_adapter(model: Any, peft_config: Any) -> None:
    """Refuse a PEFT adapter that would change the head: its weight is read directly.

    Raises:
        FastDraftError: naming the modules.
    """
    if peft_config is None:
        return
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = output.weight is embedding.weight
    refused = [
        name
        for name, module in model.named_modules()
        if module is output or (tied and module is embedding)
    ]
    for setting in ("target_modules", "modules_to_save", "trainable_token_indices"):
        wanted = getattr(peft_config, setting, None)
        if setting == "trainable_token_indices" and isinstance(wanted, list):
            wanted = ["embed_tokens"]  # PEFT's choice for a list of ids
        if wanted == "all-linear":  # PEFT leaves the head out of these
            continue
        for name in refused:
            if isinstance(wanted, str):  # a regular expression over whole names
                found = [wanted] if re.fullmatch(wanted, name) else []
            else:
                found = [w for w in wanted or [] if name == w or name.endswith(f".{w}")]
            if found:
                raise FastDraftError(
                    f"peft_config.{setting}: '{found[0]}' is the draft's head"
                    f"{' (tied to the embedding)' if tied else ''}, which takes no adapter; leave "
                    "it out"
                )


def most_steps(args: DraftDistillationConfig, dataset: Any) -> int:
    """Return more steps than the token budget can take: `Trainer` needs a number at the start.

    Raises:
        FastDraftError: the budget is below one batch.
    """
    budget = int(args.max_train_tokens or 0)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    length = float(args.max_length or 1)
    if not args.packing and "input_ids" in columns.column_names(dataset):
        length = mean_length(dataset, args.max_length)
    if budget < rows * length:
        raise FastDraftError(
            f"max_train_tokens {budget:,} is below one batch of about {rows * length:,.0f} tokens "
            f"({rows} rows of {length:,.0f}: per_device_train_batch_size x "
            "gradient_accumulation_steps x processes); raise it or lower these"
        )
    return budget + 1  # a last batch of an epoch may hold a single token


def mean_length(dataset: Any, max_length: int | None = None) -> float:
    """Return the mean length of a dataset's first rows in tokens, cut to ``max_length``."""
    streamed = isinstance(dataset, IterableDataset)
    first = dataset.take(64) if streamed else dataset.select(range(min(len(dataset), 512)))
    lengths = [len(row["input_ids"]) for row in first.select_columns(["input_ids"])]
    if max_length:
        lengths = [min(length, max_length) for length in lengths]
    return sum(lengths) / max(1, len(lengths))
