"""The position of a text stream in every checkpoint, so that a resumed run continues from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.stream import BlockStream

STREAM_STATE = "stream.json"


class SaveStreamState(TrainerCallback):
    """Writes the stream's position into checkpoints.

    `Trainer` alone would read everything again up to a checkpoint. The position is that after the
    blocks of finished steps: what a loader fetched ahead does not count.

    Args:
        stream: what is trained on.
        rows: blocks per step, over accumulation and all processes.
    """

    def __init__(self, stream: BlockStream, rows: int) -> None:
        self._stream, self._rows = stream, rows
        self._start = 0
        self._restore: Callable[[], None] | None = None

    def resume(self, trainer: Trainer, checkpoint: Path) -> None:
        """Continue the stream at a checkpoint; ``trainer.args.ignore_data_skip`` must be set.

        `Trainer`, told not to skip, restores the random state before it opens the data, which draws
        a number; here it is restored after that.
        """
        self._stream.load_state_dict(read_stream_state(checkpoint))
        # Private in `Trainer`; `tests/train/test_corpora.py` fails when it moves.
        self._restore = partial(trainer._load_rng_state, str(checkpoint))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._start = state.global_step

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            blocks = self._stream.start + (state.global_step - self._start) * self._rows
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / STREAM_STATE, self._stream.state_dict(blocks))


def read_stream_state(checkpoint: Path) -> dict[str, Any]:
    """Return the position that a checkpoint was written at.

    Raises:
        FastDraftError: it was not trained on a stream.
    """
    try:
        return dict(json.loads((checkpoint / STREAM_STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FastDraftError(
            f"{checkpoint}: no position of a stream ({STREAM_STATE}); it was not trained on one"
        ) from None
