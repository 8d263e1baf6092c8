"""Which checkpoint a killed run goes on from: the newest that was written whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_MARK = "complete"

# Processes on the CPU have the devices cpu:0, cpu:1 and so on, and `Trainer` resumes with
# `torch.load(…, map_location=device)`; torch knows the place as cpu only.
torch.serialization.register_package(
    99,
    lambda storage: None,
    lambda storage, location: storage if str(location).startswith("cpu:") else None,
)


class MarkCompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint after everything in it is written.

    ``on_save`` runs after the last file; a checkpoint without the mark was cut off by a kill, and
    `Trainer` itself would try to resume from it because it only looks at the number.
    """

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        # Every process has written files of its own.
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _MARK).touch()


def _newest_first(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]), reverse=True)


def newest_complete(folder: Path, most: int | None = None) -> Path | None:
    """Return the newest whole checkpoint in ``folder``, of at most step ``most``."""
    for path in _newest_first(folder):
        if (path / _MARK).exists() and (most is None or int(path.name.split("-")[-1]) <= most):
            return path
    return None


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in ``folder``; remove the torn ones after it."""
    good = newest_complete(folder)
    for path in _newest_first(folder):
        if path == good:
            break
        shutil.rmtree(path)
    return good


def shared_checkpoint(folder: Path) -> Path | None:
    """Return `last_complete_checkpoint` to every process; the first one looks and clears away."""
    found: list[Path | None] = [None]
    if PartialState().is_main_process:
        found = [last_complete_checkpoint(folder)]
    checkpoint: Path | None = broadcast_object_list(found)[0]
    return checkpoint


class AlreadyTrainedError(Exception):
    """What is resumed is at its end; the weights of the last checkpoint are loaded."""


class StopAtTheEnd(TrainerCallback):
    """Raises `AlreadyTrainedError` where `Trainer` would do one step more than there are."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        spent, budget = state.num_input_tokens_seen, getattr(args, "token_budget", None)
        if spent >= budget if budget else state.global_step >= state.max_steps:
            raise AlreadyTrainedError
