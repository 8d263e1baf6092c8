"""Training progress: tokens, steps, the loss, and the time of every step."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from fastdraft_hf._progress import Progress


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
