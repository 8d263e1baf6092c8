"""The trainer's progress as this project shows it: tokens, their rate, what is left, the loss."""

from __future__ import annotations

import time
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastdraft_hf._progress import Progress


class TrainingProgress(TrainerCallback):
    """A bar in a terminal, plain lines in a log; tokens/s and the loss are noted.

    Args:
        label: what is trained.
        max_train_tokens: the budget, if it is one of tokens; else steps are counted.
    """

    def __init__(self, label: str, max_train_tokens: int | None = None) -> None:
        self._label, self._budget = label, max_train_tokens
        self._progress: Progress | None = None
        self._note = ""
        self._start = 0.0
        self._start_tokens = self._tokens = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._start, self._start_tokens = time.monotonic(), state.num_input_tokens_seen
        self._tokens = self._start_tokens
        if self._budget is None:
            self._progress = Progress(self._label, state.max_steps, "steps", done=state.global_step)
        else:
            self._progress = Progress(self._label, self._budget, "tokens", done=self._tokens)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._progress is None:
            return
        seen = state.num_input_tokens_seen
        if self._budget is None:
            rate = (seen - self._start_tokens) / max(time.monotonic() - self._start, 1e-9)
            self._progress.advance(1, note=f"{seen:,} tokens, {rate:,.0f} tokens/s{self._note}")
        else:
            self._progress.advance(
                seen - self._tokens, note=f"step {state.global_step}{self._note}"
            )
        self._tokens = seen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._note = f", loss {float(logs['loss']):.3f}"
            if "expected_acceptance" in logs:
                self._note += f", expected acceptance {logs['expected_acceptance']:.3f}"

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
