"""What the trainer refuses before any work, and what it opens to be able to."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_of
from fastdraft_hf.data import columns
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.train.arguments import DraftDistillationConfig, has_fast_bf16
from fastdraft_hf.train.objectives import Objective


def check_sharding(args: DraftDistillationConfig) -> None:
    """Refuse ways of cutting up the draft that the loss or an optimizer cannot work with.

    Raises:
        ValueError: DeepSpeed ZeRO-3, FSDP's first version, or Muon with any of either.
    """
    deepspeed = args.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "DeepSpeed ZeRO-3 cuts up the draft's head, which the loss needs whole; use "
            "zero_stage 2 (recipes/accelerate/deepspeed_zero2.yaml) or FSDP2"
        )
    fsdp = bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    # The trainer's arguments go before the launcher's environment.
    version = int((args.fsdp_plugin_args or {}).get("fsdp_version", os.getenv("FSDP_VERSION", 1)))
    if fsdp and version != 2:
        raise ValueError(
            "the first version of FSDP cuts up the draft's head, which the loss needs whole; set "
            "fsdp_version: 2 (recipes/accelerate/fsdp2.yaml)"
        )
    if args.matrix_optimizer == "muon" and (fsdp or deepspeed is not None):
        raise ValueError(
            "matrix_optimizer='muon' needs whole matrices, and FSDP and DeepSpeed cut them up; use "
            "adamw"
        )


def check_stream(dataset: Any) -> None:
    """Refuse a streamed dataset that gives no row: it is repeated, and would never give one.

    Raises:
        ValueError: saying so.
    """
    if isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None:
        raise ValueError("train dataset: it gives no row")


def named_sets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Return the datasets there are, by name."""
    several = isinstance(eval_dataset, dict)
    sets = {"train": train_dataset, **(eval_dataset if several else {"eval": eval_dataset})}
    return {name: dataset for name, dataset in sets.items() if dataset is not None}


def check_sources(
    objective: Objective,
    target_model: Any,
    sets: dict[str, Any],
    *,
    vocab_size: int,
    temperature: float,
) -> bool:
    """Return whether the target's distribution is stored in the datasets.

    Raises:
        ValueError: the objective needs a distribution and there is none, or there are two sources
            of it, or some datasets store it and some do not, or what is stored is misshapen.
    """
    stored = {name: columns.has_distribution(dataset, name) for name, dataset in sets.items()}
    if target_model is not None and any(stored.values()):
        raise ValueError(
            "both an online target and stored distributions: leave target_model out, or the "
            f"columns {', '.join(columns.LISTS)}"
        )
    if target_model is None and objective.needs_distribution:
        for name, has in stored.items():
            if not has:
                raise ValueError(
                    f"objective {objective} needs the target's distribution and the {name} "
                    f"dataset has no {', '.join(columns.LISTS)}: store them, give target_model, or "
                    "train with objective ce"
                )
    if len(set(stored.values())) > 1:
        raise ValueError(
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


def open_target(
    target: str | PreTrainedModel,
    args: DraftDistillationConfig,
    tokenizer: Any,
    vocab_size: int,
    draft: str = "",
) -> PreTrainedModel:
    """Load and freeze the online target.

    Args:
        target: the model, or its name or folder.
        args: the trainer's.
        tokenizer: the draft's, if it was given.
        vocab_size: rows of the draft's head.
        draft: name or folder of the draft, where its tokenizer is otherwise.

    Raises:
        ValueError: it speaks another vocabulary than the draft.
    """
    if isinstance(target, str):
        given = _mapping(args.teacher_model_init_kwargs)
        given.setdefault("trust_remote_code", args.trust_remote_code)
        given.setdefault("dtype", torch.bfloat16 if has_fast_bf16(args.device) else torch.float32)
        try:
            theirs = AutoTokenizer.from_pretrained(target)
        except (OSError, ValueError):
            theirs = None  # a target without a tokenizer: the heads are compared below
        if tokenizer is None and draft:
            tokenizer = AutoTokenizer.from_pretrained(draft)  # as `SFTTrainer` does
        if theirs is not None and tokenizer is not None:
            try:
                check_vocabulary(
                    Vocabulary.of_tokenizer(theirs, "the target"),
                    Vocabulary.of_tokenizer(tokenizer, "the draft"),
                )
            except FastDraftError as error:
                raise ValueError(f"target_model: {error}") from error
        target = AutoModelForCausalLM.from_pretrained(target, **given)
    rows = int(head_of(target).weight.shape[0])
    if rows != vocab_size:
        raise ValueError(
            f"target_model: its head has {rows} rows, the draft's {vocab_size}: different "
            "vocabularies"
        )
    target.requires_grad_(False)
    return target.to(args.device).eval()


def check_adapter(model: Any, peft_config: Any) -> None:
    """Refuse a PEFT adapter that would change the head: its weight is read directly.

    Raises:
        ValueError: naming the modules.
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
                raise ValueError(
                    f"peft_config.{setting}: '{found[0]}' is the draft's head"
                    f"{' (tied to the embedding)' if tied else ''}, which is trained as it is "
                    "or not at all; leave it out"
                )


def _mapping(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return a config's mapping; the command line's JSON was parsed when the config was made."""
    return dict(value) if isinstance(value, dict) else {}


def most_steps(args: DraftDistillationConfig, dataset: Any) -> int:
    """Return more steps than the token budget can take: `Trainer` wants a number to begin with.

    Raises:
        ValueError: the budget is below one batch.
    """
    budget = args.token_budget
    assert budget is not None
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    length = float(args.max_length or 1)
    if not args.packing and dataset is not None and "input_ids" in columns.column_names(dataset):
        cut = not (args.dataset_kwargs or {}).get("skip_prepare_dataset")
        length = mean_length(dataset, args.max_length if cut else None)
    if budget < rows * length:
        raise ValueError(
            f"max_train_tokens {budget:,} is below one batch of about {rows * length:,.0f} tokens "
            f"({rows} rows of {length:,.0f}: per_device_train_batch_size x "
            "gradient_accumulation_steps x processes); raise it or lower these"
        )
    return int(budget) + 1  # a last batch of an epoch may hold a single token


def mean_length(dataset: Any, max_length: int | None = None) -> float:
    """Return the mean length of a dataset's first rows in tokens, cut to ``max_length``."""
    streamed = isinstance(dataset, IterableDataset)
    first = dataset.take(64) if streamed else dataset.select(range(min(len(dataset), 512)))
    lengths = [len(row["input_ids"]) for row in first.select_columns(["input_ids"])]
    if max_length:
        lengths = [min(length, max_length) for length in lengths]
    return sum(lengths) / max(1, len(lengths))
