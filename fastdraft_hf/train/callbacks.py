"""The trainer's callbacks: complete checkpoints to resume from, the token budget, progress."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress

if TYPE_CHECKING:
    from fastdraft_hf.data.packing import BlockStream

_MARK = "complete"
_STREAM_STATE = "stream.json"

# Processes on the CPU have the devices cpu:0, cpu:1 and so on. `Trainer` resumes with
# `torch.load(…, map_location=device)`, and torch knows this location as cpu only.
torch.serialization.register_package(
    99,
    lambda storage: None,
    lambda storage, location: storage if str(location).startswith("cpu:") else None,
)


class MarkCompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint when it is complete; `Trainer` would resume from an interrupted one."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every process has written files of its own
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _MARK).touch()


def _newest_first(folder: Path) -> dict[Path, int]:
    steps = {path: path.name.split("-")[-1] for path in folder.glob("checkpoint-*")}
    found = [(int(step), path) for path, step in steps.items() if step.isdigit()]
    return {path: step for step, path in sorted(found, reverse=True)}


def newest_complete(folder: Path, most: int | None = None) -> Path | None:
    """Return the newest complete checkpoint in ``folder``, of at most step ``most``."""
    for path, step in _newest_first(folder).items():
        if (path / _MARK).exists() and (most is None or step <= most):
            return path
    return None


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in ``folder``; remove incomplete ones after it."""
    good = newest_complete(folder)
    for path in _newest_first(folder):
        if path == good:
            break
        shutil.rmtree(path)
    return good


def shared_checkpoint(folder: Path) -> Path | None:
    """Return `last_complete_checkpoint`, found by the main process, in every process."""
    found: list[Path | None] = [None]
    if PartialState().is_main_process:
        found = [last_complete_checkpoint(folder)]
    checkpoint: Path | None = broadcast_object_list(found)[0]
    return checkpoint


class AlreadyTrainedError(Exception):
    """The resumed run is at its end; the weights of its last checkpoint are loaded."""


class StopAtTheEnd(TrainerCallback):
    """Raises `AlreadyTrainedError` where `Trainer` would train one step too many."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_train_tokens:
            ended = state.num_input_tokens_seen >= args.max_train_tokens
        else:
            ended = state.global_step >= state.max_steps
        if ended:
            raise AlreadyTrainedError


class SaveStreamState(TrainerCallback):
    """Writes a text stream's position into checkpoints.

    `Trainer` alone would read everything again up to a checkpoint. Blocks that a loader prefetched
    do not count. ``rows`` is the number of blocks per step, over accumulation and all processes.
    """

    def __init__(self, stream: BlockStream, rows: int) -> None:
        self._stream, self._rows = stream, rows
        self._start = 0
        self._restore: Callable[[], None] | None = None

    def resume(self, trainer: Trainer, checkpoint: Path) -> None:
        """Continue the stream at a checkpoint; ``trainer.args.ignore_data_skip`` must be set.

        With it, `Trainer` restores the random state before it opens the data, which draws a
        number; here it is restored after that.
        """
        self._stream.load_state_dict(read_stream_state(checkpoint))
        # Private in `Trainer`; `tests/train/test_corpora.py` fails when it moves.
        self._restore = partial(trainer._load_rng_state, str(checkpoint))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            blocks = self._stream.start + (state.global_step - self._start) * self._rows
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / _STREAM_STATE, self._stream.state_dict(blocks))


def read_stream_state(checkpoint: Path) -> dict[str, Any]:
    """Return the position of the stream at a checkpoint.

    Raises:
        FastDraftError: the checkpoint was not trained on a stream.
    """
    try:
        return dict(json.loads((checkpoint / _STREAM_STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FastDraftError(
            f"{checkpoint}: no position of a stream ({_STREAM_STATE}); it was not trained on one"
        ) from None


class TokenBudget(TrainerCallback):
    """Ends training with the first step after which ``max_train_tokens`` is reached."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The count is gathered over processes, so all of them stop at the same step.
        if args.max_train_tokens is None or state.num_input_tokens_seen < args.max_train_tokens:
            return
        control.should_training_stop = control.should_log = True
        # What transformers' own flow does at the last step.
        if args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= state.global_step:
            control.should_evaluate = True
        if args.save_strategy == SaveStrategy.STEPS:
            control.should_save = True
        # Trainer's closing summary divides by the planned steps.
        state.max_steps = state.global_step


class TrainingProgress(TrainerCallback):
    """Shows tokens of the budget, or steps without one, with the loss.

    Args:
        label: what is trained.
    """

    def __init__(self, label: str = "training") -> None:
        self._label = label
        self._progress: Progress | None = None
        self._note, self._done = "", 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        budget = args.max_train_tokens
        self._done = state.num_input_tokens_seen if budget else state.global_step
        total, unit = (budget, "tokens") if budget else (state.max_steps, "steps")
        self._progress = Progress(self._label, total, unit, done=self._done)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            done = state.num_input_tokens_seen if args.max_train_tokens else state.global_step
            self._progress.advance(done - self._done, note=f"step {state.global_step}{self._note}")
            self._done = done

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._note = f", loss {float(logs['loss']):.3f}"
            if "expected_acceptance" in logs:
                self._note += f", expected acceptance {logs['expected_acceptance']:.3f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None


class StepTimer(TrainerCallback):
    """Collects the wall time of every step, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.monotonic() - self._start)
