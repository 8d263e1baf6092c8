"""The trainer's progress as this project shows it: tokens, their rate, what is left, the loss."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._progress import Progress


class TrainingProgress(TrainerCallback):
    """A bar in a terminal, plain lines in a log; steps are counted, tokens/s and loss noted."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._progress: Progress | None = None
        self._note = ""
        self._start = 0.0
        self._start_tokens = 0

    @staticmethod
    def replace_defaults(trainer: Trainer) -> None:
        """Take the default bar and printer off ``trainer``, so that progress is shown once."""
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            self._progress = Progress(self._label, state.max_steps, "steps", done=state.global_step)
            self._start, self._start_tokens = time.monotonic(), state.num_input_tokens_seen

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._progress is not None:
            tokens = state.num_input_tokens_seen - self._start_tokens
            rate = tokens / max(time.monotonic() - self._start, 1e-9)
            note = f"{state.num_input_tokens_seen:,} tokens, {rate:,.0f} tokens/s{self._note}"
            self._progress.advance(1, note=note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                raise FastDraftError(
                    f"{self._label}: the loss became {logs['loss']} by step {state.global_step}; "
                    f"lower {self._label}.learning_rate or matrix_learning_rate. The checkpoints "
                    f"before are in {args.output_dir}"
                )
            self._note = f", loss {float(logs['loss']):.3f}"

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
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
