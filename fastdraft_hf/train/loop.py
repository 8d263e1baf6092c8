"""One training run from a folder of examples to a folder with the trained draft."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._atomic import atomic_folder, write_json
from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf.train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastdraft_hf.data.corpus import Corpus
    from fastdraft_hf.train.arguments import DraftDistillationConfig
    from fastdraft_hf.train.trainer import DraftDistillationTrainer

logger = logging.getLogger(__name__)

# Steps that are timed when a budget of minutes is given.
_TIMED_STEPS = 12
# Steps that are timed for the estimate alone, and the fewest steps of a run that is worth it.
_ESTIMATED_STEPS, _WORTH_ESTIMATING = 5, 200


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
    target: Path | None = None,
    corpus: Corpus | None = None,
) -> dict[str, Any]:
    """Train, going on from the last whole checkpoint in ``work`` if there is one.

    Args:
        start_model: the draft to start from.
        tokenizer: the target's.
        data: datasets ``train`` and, if held out, ``eval``, of ``input_ids`` and ``labels``, and
            the stored distribution if there is one.
        work: checkpoints go here, and the trained draft to ``work/model``.
        config: the stage's section.
        seed: of shuffling.
        device: ``cpu`` or ``cuda``.
        label: the stage's name, for progress lines.
        target: folder of the online target, if the objective needs one.
        corpus: packed text to train on instead of ``data``.

    Returns:
        facts for the provenance; ``log`` is the trainer's log history.
    """
    import datasets
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.train.checkpoints import (
        AlreadyTrainedError,
        StopAtTheEnd,
        last_complete_checkpoint,
    )
    from fastdraft_hf.train.progress import TrainingProgress
    from fastdraft_hf.train.streaming import SaveStreamState

    work.mkdir(parents=True, exist_ok=True)
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    stream = None if corpus is None else corpus.stream
    if corpus is not None:
        train_set, eval_set = corpus.train, corpus.eval
    else:
        train_set = datasets.load_from_disk(str(data / "train"))
        eval_set = datasets.load_from_disk(str(data / "eval")) if (data / "eval").exists() else None
    model = AutoModelForCausalLM.from_pretrained(start_model, dtype="float32")

    def trainer_for(
        arguments: DraftDistillationConfig,
        model: PreTrainedModel,
        callbacks: list[Any],
        train_set: Any,
    ) -> DraftDistillationTrainer:
        from fastdraft_hf.train.trainer import DraftDistillationTrainer

        try:
            return DraftDistillationTrainer(
                model=model,
                args=arguments,
                train_dataset=train_set,
                eval_dataset=eval_set,
                processing_class=tokenizer,
                target_model=None if target is None else str(target),
                peft_config=_peft_config(config),
                callbacks=callbacks,
            )
        except ValueError as error:  # what the trainer or TRL refuses
            raise FastDraftError(f"{label}: {error}") from error

    def timed(folder: Path, steps: int) -> DraftDistillationTrainer:
        arguments = training_arguments(config, folder, seed=seed, device=device, max_steps=steps)
        arguments.save_strategy = arguments.eval_strategy = "no"
        arguments.disable_tqdm = True
        few = train_set
        if stream is not None:
            few = datasets.Dataset.from_list(list(itertools.islice(stream, rows)))
        return trainer_for(arguments, copy.deepcopy(model), [], few)

    plan = _plan(work, config, timed, label)
    budget = int(plan["max_train_tokens"])
    arguments = training_arguments(config, work, seed=seed, device=device, max_train_tokens=budget)
    arguments.eval_strategy = "steps" if eval_set is not None else "no"
    callbacks: list[Any] = [TrainingProgress(label, budget), StopAtTheEnd()]
    keeper: SaveStreamState | None = None
    checkpoint = last_complete_checkpoint(work)
    if checkpoint is not None:
        logger.info("%s: going on from %s", label, checkpoint.name)
    if stream is not None:
        arguments.ignore_data_skip = True  # the stream itself begins where the checkpoint was
        # Before `MarkCompleteCheckpoints`, which the trainer adds after what it is given.
        callbacks.append(keeper := SaveStreamState(stream, rows))
    trainer = trainer_for(arguments, model, callbacks, train_set)
    if keeper is not None and checkpoint is not None:
        keeper.resume(trainer, checkpoint)
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AlreadyTrainedError:
        pass  # killed between the last checkpoint and the finished model: the budget is spent
    except FastDraftError as error:  # a loss that is no number
        raise type(error)(f"{label}: {error}") from error
    seconds = time.monotonic() - start
    if not (work / "model").exists():
        with atomic_folder(work / "model") as temporary:
            if config.lora is not None:
                trainer.model.save_pretrained(temporary / "adapter")
                trainer.model.merge_and_unload().save_pretrained(temporary)
            else:
                if config.start_weight:
                    average_weights(trainer.model, start_model, config.start_weight)
                trainer.model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    tokens = trainer.state.num_input_tokens_seen
    facts: dict[str, Any] = {} if stream is None else {"read": _read_by(work)}
    return {
        **facts,
        "plan": plan,
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "epochs": trainer.state.epoch,
        "objective": trainer.objective.weights,
        "seconds_of_last_run": round(seconds, 1),
        "head_dtype": str(trainer.head_dtype).removeprefix("torch."),
        "log": trainer.state.log_history,
    }


def average_weights(model: PreTrainedModel, start_model: Path, share: float) -> None:
    """Move weights back to where training began by a share of the way.

    Both lie in one basin of the loss, so the average keeps most of what was learned and most of
    what would be forgotten (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).
    """
    import torch
    from transformers import AutoModelForCausalLM

    start = dict(
        AutoModelForCausalLM.from_pretrained(start_model, dtype="float32").named_parameters()
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.lerp_(start[name].to(weight.device), share)


def _read_by(work: Path) -> dict[str, Any] | None:
    """Return what a stream had read of every source at the last checkpoint, which is the end."""
    from fastdraft_hf.train.checkpoints import newest_complete
    from fastdraft_hf.train.streaming import read_stream_state

    checkpoint = newest_complete(work)
    return None if checkpoint is None else dict(read_stream_state(checkpoint)["read"])


def _peft_config(config: TrainConfig) -> Any:
    if config.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )


def training_arguments(
    config: TrainConfig,
    work: Path,
    *,
    seed: int,
    device: str,
    max_train_tokens: int | None = None,
    max_steps: int = -1,
) -> DraftDistillationConfig:
    """Return the trainer's arguments for a section.

    Args:
        config: the section.
        work: where checkpoints go.
        seed: of shuffling.
        device: ``cpu`` or ``cuda``.
        max_train_tokens: the budget; the section's if neither it nor ``max_steps`` is given.
        max_steps: a number of steps instead.

    Raises:
        FastDraftError: ``trainer_args`` names a field that does not exist or has a bad value, or
            the objective is none.
    """
    import dataclasses

    from fastdraft_hf.train.arguments import DraftDistillationConfig, has_fast_bf16

    known = {f.name for f in dataclasses.fields(DraftDistillationConfig)}
    for name in config.trainer_args:
        if name not in known:
            raise FastDraftError(f"trainer_args.{name}: unknown field{nearest(name, known)}")
    if max_steps < 1:
        max_train_tokens = max_train_tokens or config.max_train_tokens
    gpu = device == "cuda"
    fields: dict[str, Any] = {
        "output_dir": str(work),
        "objective": "ce" if config.objective == "auto" else config.objective,
        "temperature": config.temperature,
        "sampled_softmax": config.sampled_softmax,
        "max_steps": max_steps,
        "max_train_tokens": None if max_train_tokens is None else str(max_train_tokens),
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "matrix_optimizer": config.matrix_optimizer,
        "matrix_learning_rate": config.matrix_learning_rate,
        "adam_beta2": 0.95,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup,
        "decay_share": config.decay,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "logging_steps": config.logging_steps,
        "eval_steps": config.save_steps,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "max_length": config.max_length,
        # The rows are token ids with labels already; only packing is left to TRL.
        "dataset_kwargs": {"skip_prepare_dataset": not config.trainer_args.get("packing")},
        "include_num_input_tokens_seen": "non_padding",
        "prediction_loss_only": True,
        "gradient_checkpointing": False,
        "bf16": has_fast_bf16(device),
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
        text = str(error)
        where = "" if text.startswith("objective") else "trainer_args: "
        raise FastDraftError(f"{where}{text}") from error


def _plan(
    work: Path,
    config: TrainConfig,
    timed: Callable[[Path, int], DraftDistillationTrainer],
    label: str,
) -> dict[str, Any]:
    """Return the budget and how long it will take, decided once and kept for resumed runs."""
    path = work / "plan.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    budget, facts = config.max_train_tokens, {}
    steps = _TIMED_STEPS
    if config.max_minutes is None:
        # A short run is over before an estimate of it would be worth anything.
        worth_it = budget >= _WORTH_ESTIMATING * config.step_tokens
        steps = _ESTIMATED_STEPS if worth_it else 0
    rate = _tokens_a_second(work, timed, steps) if steps else None
    if rate is not None:
        facts = {"tokens_a_second": round(rate, 1), "timed_steps": steps}
    if config.max_minutes is not None and rate is not None:
        affordable = max(config.step_tokens, int(60 * config.max_minutes * rate))
        facts["asked_for"] = budget
        if affordable < budget:
            logger.warning(
                "this machine trains %s tokens a second: %s instead of %s tokens fit into "
                "max_minutes: %g",
                f"{rate:,.0f}",
                f"{affordable:,}",
                f"{budget:,}",
                config.max_minutes,
            )
            budget = affordable
    if rate is not None:
        facts["estimated_minutes"] = round(budget / rate / 60, 2)
        logger.info(
            "%s: %s tokens at %s tokens/s (%d steps timed on a copy of the draft): about %s",
            label,
            f"{budget:,}",
            f"{rate:,.0f}",
            steps,
            _duration(budget / rate),
        )
    plan = {"max_train_tokens": budget, **facts}
    write_json(path, plan)
    return plan


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _tokens_a_second(
    work: Path, timed: Callable[[Path, int], DraftDistillationTrainer], steps: int
) -> float:
    """Time a few real steps on a copy of the draft."""
    import tempfile

    from fastdraft_hf.train.progress import StepTimer

    with tempfile.TemporaryDirectory(dir=work) as scratch:
        trainer = timed(Path(scratch), steps)
        timer = StepTimer()
        trainer.add_callback(timer)
        trainer.train()
    times = sorted(timer.seconds[2:])  # the first steps warm up
    step_tokens = trainer.state.num_input_tokens_seen / trainer.state.global_step
    return float(step_tokens / times[len(times) // 2])
