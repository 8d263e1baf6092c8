"""What the trainer refuses before any work and while training, and the online teacher."""

import os
import re
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_of
from fastdraft_hf.data import columns
from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary
from fastdraft_hf.train.config import DraftDistillationConfig, has_fast_bf16
from fastdraft_hf.train.objectives import Objective


def named_sets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Return the datasets by name; a single evaluation set is ``eval``."""
    several = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    return {k: v for k, v in {"train": train_dataset, **several}.items() if v is not None}


def check_rows(sets: dict[str, Any]) -> None:
    """Refuse a dataset without rows."""
    for name, dataset in sets.items():
        if next(iter(dataset), None) is None:
            raise FastDraftError(f"{name} dataset: it has no rows")


def check_labels(sets: dict[str, Any], args: DraftDistillationConfig) -> None:
    """Refuse a prepared dataset in which no token carries loss; streams are not read."""
    kept = slice(args.max_length)
    if args.max_length and args.truncation_mode == "keep_end":
        kept = slice(-args.max_length, None)
    for name, dataset in sets.items():
        if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
            continue
        rows = dataset.select_columns(["labels"]).with_format(None)
        if not any(label != columns.IGNORED for row in rows for label in row["labels"][kept][1:]):
            raise FastDraftError(
                f"no row of the {name} dataset has a label left; raise max_length (prompts may "
                "fill it), or label the tokens to train on"
            )


def check_sources(objective: Objective, online: bool, stored: dict[str, bool]) -> None:
    """Refuse two sources of the teacher's distribution, and none where the objective needs one."""
    if online and any(stored.values()):
        raise FastDraftError(
            "both an online teacher and stored distributions: leave teacher_model out, or the "
            f"columns {', '.join(columns.LISTS)}"
        )
    for name, has in stored.items():
        if objective.needs_distribution and not online and not has:
            raise FastDraftError(
                f"objective {objective} needs the target's distribution and the {name} dataset has "
                f"no {', '.join(columns.LISTS)}: store them, give teacher_model, or train with "
                "objective ce"
            )


def open_teacher(
    teacher: str | PreTrainedModel, args: DraftDistillationConfig, tokenizer: Any, vocab_size: int
) -> PreTrainedModel:
    """Load the online teacher and freeze it; refuse one whose vocabulary is not the draft's."""
    if isinstance(teacher, str):
        kwargs = args.teacher_model_init_kwargs
        given = dict(kwargs) if isinstance(kwargs, dict) else {}
        given.setdefault("trust_remote_code", args.trust_remote_code)
        given.setdefault("dtype", torch.bfloat16 if has_fast_bf16(args.device) else torch.float32)
        theirs = AutoTokenizer.from_pretrained(
            teacher, trust_remote_code=given["trust_remote_code"]
        )
        check_vocabulary(
            Vocabulary.of_tokenizer(theirs, "the target"),
            Vocabulary.of_tokenizer(tokenizer, "the draft"),
        )
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
    """Refuse a PEFT adapter on the head, because the loss reads the head's weight directly."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = output.weight is embedding.weight
    heads = [output, embedding] if tied else [output]
    names = [name for name, module in model.named_modules() if module in heads]
    for setting in ("target_modules", "modules_to_save", "trainable_token_indices"):
        wanted = getattr(peft_config, setting, None) or []
        if setting == "trainable_token_indices" and isinstance(wanted, list) and wanted:
            wanted = ["embed_tokens"]  # PEFT's choice for a list of ids
        if not isinstance(wanted, str):  # which is a regular expression over full names
            wanted = "|".join(rf"(?:.*\.)?{re.escape(one)}" for one in wanted)
        for name in names:
            if re.fullmatch(wanted, name):
                raise FastDraftError(
                    f"peft_config.{setting}: '{name}' is the draft's head"
                    f"{' (tied to the embedding)' if tied else ''}, which takes no adapter; leave "
                    "it out"
                )


def check_sharding(args: DraftDistillationConfig) -> None:
    """Refuse ways of sharding that the loss, Muon or weight averaging cannot work with."""
    deepspeed = args.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise FastDraftError(
            "DeepSpeed ZeRO-3 shards the draft's head, which the loss needs whole; use "
            "zero_stage 2 (recipes/accelerate/deepspeed_zero2.yaml) or FSDP2"
        )
    fsdp = bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    # The trainer's arguments take precedence over the launcher's environment.
    version = int((args.fsdp_plugin_args or {}).get("fsdp_version", os.getenv("FSDP_VERSION", 1)))
    if fsdp and version != 2:
        raise FastDraftError(
            "the first version of FSDP shards the draft's head, which the loss needs whole; set "
            "fsdp_version: 2 (recipes/accelerate/fsdp2.yaml)"
        )
    if args.use_muon and (fsdp or deepspeed is not None):
        raise FastDraftError(
            "use_muon: Muon needs unsharded matrices, and FSDP and DeepSpeed shard them; set "
            "use_muon to false"
        )
    if args.start_weight and fsdp:
        raise FastDraftError("start_weight: FSDP shards the weights; set it to 0 or use DDP")


class NonFiniteLossError(FastDraftError):
    """The loss or its gradient is NaN or infinite; the weights were not touched."""
