"""One training run, in one process or many: from a draft's folder to the trained draft's folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import read_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.train.section import TrainingSection

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

    from fastdraft_hf.data.packing import BlockStream
    from fastdraft_hf.train.trainer import DraftDistillationTrainer


def train(
    start_model: Path,
    work: Path,
    section: TrainingSection,
    *,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | None = None,
    stream: BlockStream | None = None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: str,
    label: str,
    teacher: Path | None = None,
) -> dict[str, Any]:
    """Train a draft in every process, resuming from the last complete checkpoint in ``work``.

    Args:
        start_model: folder of the draft to start from.
        work: where checkpoints go; the trained draft goes to ``work/model``.
        train_dataset, eval_dataset: rows as `DraftDistillationTrainer` takes them.
        stream: what ``train_dataset`` reads, if it is a stream; checkpoints hold its position.
        label: the stage's name, for progress lines and errors.
        teacher: folder of the online teacher, if the objective needs one.

    Returns:
        facts for the provenance; ``log`` is the trainer's log history.

    Raises:
        FastDraftError: the trainer refuses the data or a setting, or a loss is not finite.
    """
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.train.callbacks import (
        LimitOverhead,
        SaveStreamState,
        TrainingProgress,
        newest_complete,
        read_stream_state,
    )
    from fastdraft_hf.train.trainer import DraftDistillationTrainer

    evaluated = "no" if eval_dataset is None else "steps"
    changes = {"eval_strategy": evaluated, "eval_steps": section.eval_steps or section.save_steps}
    callbacks: list[Any] = [TrainingProgress(label), LimitOverhead()]
    try:
        args = section.trainer_config(work, seed=seed, device=device, **changes)
        if stream is not None:
            args.ignore_data_skip = True  # the stream itself continues at the checkpoint
            rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            # Before `MarkCompleteCheckpoints`, which the trainer adds after what it is given.
            callbacks.append(SaveStreamState(stream, rows))
        trainer = DraftDistillationTrainer(
            AutoModelForCausalLM.from_pretrained(
                start_model, dtype="float32", trust_remote_code=False
            ),
            args,
            teacher_model=None if teacher is None else str(teacher),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=section.peft_config(),
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=True)
    except FastDraftError as error:
        raise type(error)(f"{label}: {error}") from error
    except ValueError as error:  # refused by TRL
        raise FastDraftError(f"{label}: {' '.join(str(error).split())}") from error
    save(trainer, work / "model")
    facts: dict[str, Any] = {}
    if stream is not None and (last := newest_complete(work)) is not None:
        facts["read"] = read_stream_state(last)["read"]  # at the end, which is a checkpoint
    return {
        **facts,
        "max_train_tokens": trainer.args.max_train_tokens,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "epochs": trainer.state.epoch,
        "processes": trainer.args.world_size,
        "objective": trainer.objective.weights,
        "log": trainer.state.log_history,
    }


def tokens_per_minute(
    draft: Path, section: TrainingSection, tokenizer: PreTrainedTokenizerBase, device: str
) -> float:
    """Return how fast this process trains a draft with cross-entropy, on rows of 256 random ids."""
    import datasets
    import torch

    steps, length = 8, min(256, section.max_length)
    rows = section.per_device_train_batch_size * section.gradient_accumulation_steps
    size = read_json(draft / "config.json")["vocab_size"]
    ids = torch.randint(size, (steps * rows, length), generator=torch.Generator().manual_seed(0))
    data = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    changes = {"max_train_tokens": steps * rows * length, "logging_steps": 1, "objective": "ce"}
    changes["report_to"] = "none"  # it is no run of the user's
    with tempfile.TemporaryDirectory() as folder:
        facts = train(
            draft,
            Path(folder),
            section.model_copy(update=changes),
            train_dataset=data,
            tokenizer=tokenizer,
            seed=0,
            device=device,
            label="speed of training",
        )
    rates = [entry["tokens_per_second"] for entry in facts["log"] if "tokens_per_second" in entry]
    return float(60 * median(rates[2:]))  # the first steps allocate


def save(trainer: DraftDistillationTrainer, folder: Path) -> None:
    """Write the draft and its tokenizer completely or not at all; adapters are merged.

    Every process calls this: a sharded draft is gathered from all of them.
    """
    accelerator, partial = trainer.accelerator, folder.with_name(f".{folder.name}.partial")
    adapter = partial / "adapter" if hasattr(trainer.model, "peft_config") else None
    trainer.save_model(str(adapter or partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if adapter is not None:
            from peft import AutoPeftModelForCausalLM

            adapted = AutoPeftModelForCausalLM.from_pretrained(
                adapter, dtype="float32", trust_remote_code=False
            )
            adapted.merge_and_unload().save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
        for pickled in partial.rglob("training_args.bin"):
            pickled.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    accelerator.wait_for_everyone()
