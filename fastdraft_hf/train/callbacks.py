"""The trainer's callbacks: complete checkpoints to resume from, the token budget, progress."""

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from fastdraft_hf._atomic import fsync_path, read_json, sha256_file, write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress
from fastdraft_hf.data.packing import BlockStream

_MARK = "complete"  # the digests of a checkpoint's files, written after them
_STREAM_STATE = "stream.json"
# The steps that `max_minutes` is judged by, after those in which the device warms up.
_WARM_STEPS, _TIMED_STEPS = 2, 10
# The share of the time that checkpoints may take, and evaluations, if they take more seconds.
OVERHEAD, _SHORT = 0.05, 1.0

logger = logging.getLogger(__name__)

# Processes on the CPU have the devices cpu:0, cpu:1 and so on. `Trainer` resumes with
# `torch.load(…, map_location=device)`, and torch knows this location as cpu only.
torch.serialization.register_package(
    99,
    lambda storage: None,
    lambda storage, location: storage if str(location).startswith("cpu:") else None,
)


class MarkCompleteCheckpoints(TrainerCallback):
    """Lists a complete checkpoint's files in `_MARK`; `Trainer` would resume from any other."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every process has written files of its own
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            # Processors hash while the disk writes.
            with ThreadPoolExecutor() as pool:
                flushed = pool.map(fsync_path, (*checkpoint.rglob("*"), checkpoint))
                digests = _digests(checkpoint)
            list(flushed)  # raises their errors
            write_json(checkpoint / _MARK, digests)


def _digests(checkpoint: Path) -> dict[str, str]:
    """Return the sha256 of every file of a checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != _MARK)
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter
        digests = pool.map(sha256_file, files)
        return {
            str(path.relative_to(checkpoint)): sha for path, sha in zip(files, digests, strict=True)
        }


def newest_complete(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in ``folder``; its files are not read."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{_MARK}")]
    return max(complete, key=lambda path: int(path.name.split("-")[-1]), default=None)


def open_checkpoint(wanted: str | bool | None, folder: Path) -> Path | None:
    """Return the intact checkpoint to resume from, the same in every process.

    The main process looks for it and reads its files.

    Args:
        wanted: the checkpoint, or True for the newest intact one in ``folder``; those that are
            damaged are moved aside.

    Raises:
        FastDraftError: ``wanted`` is not a checkpoint, or it is damaged.
    """
    if not wanted:
        return None
    found: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            found = [_newest_intact(folder) if wanted is True else _checked(Path(wanted))]
        except FastDraftError as error:
            found = [error]
    (checkpoint,) = broadcast_object_list(found)
    if isinstance(checkpoint, FastDraftError):
        raise checkpoint
    return None if checkpoint is None else Path(checkpoint)


def _newest_intact(folder: Path) -> Path | None:
    while (checkpoint := newest_complete(folder)) is not None:
        damage = _damage(checkpoint)
        if damage is None:
            break
        aside = checkpoint.rename(folder / f"damaged-{checkpoint.name}-{time.time_ns()}")
        logger.warning(
            "%s: %s; the checkpoint is not used and was moved to %s", checkpoint, damage, aside.name
        )
    return checkpoint


def _checked(checkpoint: Path) -> Path:
    """Return a checkpoint that was given by its path, or refuse it."""
    problem: str | None = None
    if not checkpoint.is_dir():
        problem = "there is no such folder"
    elif not (checkpoint / TRAINER_STATE_NAME).is_file():
        problem = f"not a checkpoint: it holds no {TRAINER_STATE_NAME}"
    elif not (checkpoint / _MARK).is_file():
        problem = f"it was not saved to its end, or by another trainer: it holds no {_MARK}"
    elif damage := _damage(checkpoint):
        problem = f"{damage}; give the checkpoint before it"
    if problem is not None:
        raise FastDraftError(f"resume_from_checkpoint: {checkpoint}: {problem}")
    return checkpoint


def _damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, if anything is."""
    listed: dict[str, str] = {}
    with contextlib.suppress(ValueError, TypeError):
        listed = dict(read_json(checkpoint / _MARK))
    if not listed:
        return f"{_MARK} is damaged, or of an older version: it lists no files"
    found = _digests(checkpoint)
    damaged = [name for name, digest in listed.items() if found.get(name) != digest]
    return f"{damaged[0]} is damaged or missing" if damaged else None


class AlreadyTrainedError(Exception):
    """The resumed run is at its end; the weights of its last checkpoint are loaded."""


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
    """Return the position of the stream at a checkpoint."""
    return dict(read_json(checkpoint / _STREAM_STATE))


class TimeBudget(TrainerCallback):
    """Cuts ``max_train_tokens`` to what ``max_minutes`` affords at the rate of the last steps.

    The minutes begin when the trainer is made. The rate is measured after the first steps, earlier
    if half of the minutes are over, and again after twice as many steps and so on, since other work
    may slow the machine down, or end. Checkpoints and evaluations are no part of it: the first take
    long beside the first steps. They get `OVERHEAD` of the time (`LimitOverhead`), and those at the
    end as long as the last ones took. ``plan.json`` in ``output_dir`` holds the budgets and their
    steps; a resumed run repeats them.
    """

    def __init__(self) -> None:
        self._begun, self._next = time.monotonic(), _WARM_STEPS + _TIMED_STEPS
        self._seconds, self._tokens = 0.0, 0  # of the steps since the rate was measured
        # When the last step ended, and what was read by then.
        self._ended, self._seen = self._begun, 0
        self._paused, self._pause = False, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._path, self._first = Path(args.output_dir) / "plan.json", state.global_step
        self._wanted = int(args.max_train_tokens)
        known = state.is_world_process_zero and self._path.exists()
        self._cuts = broadcast_object_list([read_json(self._path) if known else []])[0]
        self._cut(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._paused = True

    on_evaluate = on_save

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._paused:
            now = time.monotonic()
            self._paused, self._pause, self._ended = False, now - self._ended, now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, seen = state.global_step - self._first, state.num_input_tokens_seen
        now = time.monotonic()
        if step > _WARM_STEPS:
            self._seconds += now - self._ended
            self._tokens += seen - self._seen
        self._ended, self._seen = now, seen
        due = step == self._next
        if _WARM_STEPS < step < self._next == _WARM_STEPS + _TIMED_STEPS:  # before the first time
            due = broadcast_object_list([now > self._begun + 30 * args.max_minutes])[0]
        if due:
            self._next *= 2
            rate = (1 - OVERHEAD) * self._tokens / self._seconds
            self._seconds, self._tokens = 0.0, 0
            left = max(0.0, 60 * args.max_minutes + self._begun - now - self._pause)
            affordable = min(int(seen + left * rate), self._wanted)
            cut = {"max_train_tokens": affordable, "tokens_per_second": round(rate, 1)}
            cut = broadcast_object_list([cut | {"after_step": state.global_step}])[0]
            change = cut["max_train_tokens"] / int(args.max_train_tokens) - 1
            # A few percent more or less than before are noise.
            if abs(change) > (0.05 if self._cuts else 0.0):
                logger.warning(
                    f"this machine trains {rate:,.0f} tokens per second: {affordable:,} instead of "
                    f"{self._wanted:,} tokens fit into {args.max_minutes:.3g} minutes"
                )
                self._cuts.append(cut)
                if state.is_world_process_zero:
                    write_json(self._path, self._cuts)
        self._cut(args, state)

    def _cut(self, args: Any, state: Any) -> None:
        for cut in self._cuts:
            if state.global_step >= cut["after_step"]:
                args.max_train_tokens = cut["max_train_tokens"]


class TokenBudget(TrainerCallback):
    """Ends training with the first step after which ``max_train_tokens`` is reached."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `Trainer` would train one step too many.
        if args.max_train_tokens:
            ended = state.num_input_tokens_seen >= args.max_train_tokens
        else:
            ended = state.global_step >= state.max_steps
        if ended:
            raise AlreadyTrainedError

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


class LimitOverhead(TrainerCallback):
    """Leaves out checkpoints and evaluations that would take more than `OVERHEAD` of the time.

    Both grow with the vocabulary, while a step of a small draft is short. Each is judged by how
    long the last one took: what took less than a second is never left out, nor is the first of a
    kind, nor those at the end.
    """

    def __init__(self) -> None:
        self._now, self._saves = 0.0, False
        self._last = dict[str, tuple[float, float]]()  # how long it took, and when it ended

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._now = time.monotonic()
        if (control.should_save or control.should_evaluate) and not control.should_training_stop:
            soon = [
                name
                for name, (took, ended) in self._last.items()
                if took > max(_SHORT, OVERHEAD * (self._now - ended))
            ]
            (soon,) = broadcast_object_list([soon])  # the main process decides
            control.should_evaluate &= "evaluate" not in soon
            control.should_save &= "save" not in soon
        self._saves = control.should_save

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note("evaluate")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._saves:  # not in `on_save`: other callbacks write into a checkpoint too
            self._note("save")

    def _note(self, name: str) -> None:
        begun, self._now = self._now, time.monotonic()
        self._last[name] = self._now - begun, self._now


class TrainingProgress(TrainerCallback):
    """Shows tokens of the budget, or steps without one, with the loss."""

    def __init__(self, label: str = "training") -> None:
        self._label, self._note, self._done = label, "", 0
        self._progress: Progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        budget = args.max_train_tokens
        self._done = state.num_input_tokens_seen if budget else state.global_step
        total, unit = (budget, "tokens") if budget else (state.max_steps, "steps")
        self._progress = Progress(self._label, total, unit, done=self._done)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.total = args.max_train_tokens or state.max_steps  # may be cut
        done = state.num_input_tokens_seen if args.max_train_tokens else state.global_step
        self._progress.advance(done - self._done, note=f"step {state.global_step}{self._note}")
        self._done = done

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._note = f", loss {float(logs['loss']):.3f}"
            if "expected_acceptance" in logs:
                self._note += f", expected acceptance {logs['expected_acceptance']:.3f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.__exit__(None, None, None)
