"""One training run from a folder of examples to a folder with the trained draft."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.training.config import TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastdraft_hf.training.trainer import DraftDistillationConfig, DraftDistillationTrainer

logger = logging.getLogger(__name__)


def train(
    start_model: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    work: Path,
    config: TrainConfig,
    *,
    seed: int,
    device: str,
    label: str,
) -> dict[str, Any]:
    """Train, going on from the last whole checkpoint in ``work`` if there is one.

    Args:
        start_model: the draft to start from.
        tokenizer: the target's.
        data: data sets ``train`` and, if held out, ``eval``, of ``input_ids`` and ``labels``.
        work: checkpoints go here, and the trained draft to ``work/model``.
        config: the stage's section.
        seed: of shuffling.
        device: ``cpu`` or ``cuda``.
        label: the stage's name, for progress lines.

    Returns:
        facts for the provenance; ``log`` is the trainer's log history.
    """
    import datasets
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.training.checkpoints import MarkCompleteCheckpoints, last_complete_checkpoint
    from fastdraft_hf.training.progress import TrainingProgress
    from fastdraft_hf.training.trainer import DraftDistillationTrainer

    work.mkdir(parents=True, exist_ok=True)
    train_set = datasets.load_from_disk(str(data / "train"))
    eval_set = datasets.load_from_disk(str(data / "eval")) if (data / "eval").exists() else None
    model = AutoModelForCausalLM.from_pretrained(start_model)
    steps = _planned_steps(work, config, train_set, model, tokenizer, device, seed)
    arguments = training_arguments(config, work, steps=steps, seed=seed, device=device)
    arguments.eval_strategy = "steps" if eval_set is not None else "no"
    try:
        trainer = DraftDistillationTrainer(
            model=model,
            args=arguments,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            callbacks=[MarkCompleteCheckpoints(), TrainingProgress(label)],
        )
    except ValueError as error:  # what TRL refuses comes from trainer_args
        raise FastDraftError(f"{label}.trainer_args: {error}") from error
    TrainingProgress.replace_defaults(trainer)
    checkpoint = last_complete_checkpoint(work)
    if checkpoint is not None:
        logger.info("%s: going on from %s", label, checkpoint.name)
    start = time.monotonic()
    if checkpoint is None or _step_of(checkpoint) < steps:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    else:  # killed between the last checkpoint and the finished model: all steps are done
        _restore(trainer, checkpoint)
    seconds = time.monotonic() - start
    if not (work / "model").exists():
        with atomic_folder(work / "model") as temporary:
            trainer.model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    tokens = trainer.state.num_input_tokens_seen
    return {
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "epochs": trainer.state.epoch,
        "seconds_of_last_run": round(seconds, 1),
        "head_dtype": str(trainer.head_dtype).removeprefix("torch."),
        "log": trainer.state.log_history,
    }


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def _restore(trainer: DraftDistillationTrainer, checkpoint: Path) -> None:
    """Take weights and state from a checkpoint of the last step; `Trainer` would do one more."""
    from safetensors.torch import load_model
    from transformers import TrainerState

    load_model(trainer.model, str(checkpoint / "model.safetensors"), device="cpu")
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def training_arguments(
    config: TrainConfig, work: Path, *, steps: int, seed: int, device: str
) -> DraftDistillationConfig:
    """Return the trainer's arguments for a section.

    Raises:
        FastDraftError: ``trainer_args`` names a field that does not exist or has a bad value.
    """
    import dataclasses

    from fastdraft_hf.training.trainer import DraftDistillationConfig, has_fast_bf16

    known = {f.name for f in dataclasses.fields(DraftDistillationConfig)}
    for name in config.trainer_args:
        if name not in known:
            raise FastDraftError(f"trainer_args.{name}: unknown field{nearest(name, known)}")
    gpu = device == "cuda"
    fields: dict[str, Any] = {
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "matrix_optimizer": config.matrix_optimizer,
        "matrix_learning_rate": config.matrix_learning_rate,
        "adam_beta2": 0.95,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": max(1, round(config.warmup * steps)) if config.warmup else 0,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "logging_steps": config.logging_steps,
        "eval_steps": config.save_steps,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "max_length": config.seq_length,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "include_num_input_tokens_seen": "non_padding",
        "prediction_loss_only": True,
        "gradient_checkpointing": False,
        "bf16": gpu and has_fast_bf16("cuda"),
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        # Trainer would show the mean of the finite steps instead of a loss that became NaN.
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "seed": seed,
        "data_seed": seed,
        **config.trainer_args,
    }
    try:
        return DraftDistillationConfig(**fields)
    except (TypeError, ValueError) as error:
        raise FastDraftError(f"trainer_args: {error}") from error


def _planned_steps(
    work: Path,
    config: TrainConfig,
    train_set: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    seed: int,
) -> int:
    """Return the number of steps, decided once and kept, so that a resumed run has the same."""
    import json

    plan = work / "plan.json"
    if plan.exists():
        return int(json.loads(plan.read_text(encoding="utf-8"))["steps"])
    sample = train_set.select(range(min(len(train_set), 512)))
    mean_length = sum(len(ids) for ids in sample["input_ids"]) / len(sample)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    step_tokens = mean_length * batch * world
    steps = max(1, round(config.max_train_tokens / step_tokens))
    facts: dict[str, Any] = {"tokens_a_step": step_tokens}
    if config.max_minutes is not None:
        seconds = _seconds_a_step(work, config, train_set, model, tokenizer, device, seed)
        affordable = max(1, int(60 * config.max_minutes / seconds))
        facts |= {"seconds_a_step": seconds, "steps_by_budget": steps}
        if affordable < steps:
            logger.warning(
                "this machine takes %.2f s a step: %d steps (%s tokens) instead of %d fit into "
                "max_minutes: %g",
                seconds,
                affordable,
                f"{int(affordable * step_tokens):,}",
                steps,
                config.max_minutes,
            )
            steps = affordable
    write_json(plan, {"steps": steps, **facts})
    return steps


def _seconds_a_step(
    work: Path,
    config: TrainConfig,
    train_set: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    seed: int,
) -> float:
    """Time a few real steps on a copy of the draft."""
    import copy
    import tempfile

    from fastdraft_hf.training.progress import StepTimer, TrainingProgress
    from fastdraft_hf.training.trainer import DraftDistillationTrainer

    steps = 12
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        arguments = training_arguments(config, Path(scratch), steps=steps, seed=seed, device=device)
        arguments.save_strategy = arguments.eval_strategy = "no"
        trainer = DraftDistillationTrainer(
            model=copy.deepcopy(model),
            args=arguments,
            train_dataset=train_set,
            processing_class=tokenizer,
        )
        TrainingProgress.replace_defaults(trainer)
        timer = StepTimer()
        trainer.add_callback(timer)
        trainer.train()
    times = sorted(timer.seconds[2:])  # the first steps warm up
    return times[len(times) // 2]
