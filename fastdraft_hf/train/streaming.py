"""A stream's place goes into every checkpoint, so that a resumed run reads on where it stopped."""

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

PLACE = "stream.json"


class KeepStreamPlace(TrainerCallback):
    """Writes the stream's place into checkpoints.

    `Trainer` would find its place again by reading everything once more up to there. What it has
    fetched ahead does not count: the place is that of the blocks of finished steps.

    Args:
        stream: what is trained on.
        rows: blocks a step, over accumulation and all processes.
    """

    def __init__(self, stream: BlockStream, rows: int) -> None:
        self._stream, self._rows = stream, rows
        self._start = 0
        self._restore: Callable[[], None] | None = None

    def resume(self, trainer: Trainer, checkpoint: Path) -> None:
        """Restore the random numbers' state where `Trainer` does when it skips data itself.

        Told not to skip, it restores it before it opens the data, which draws a number.
        """
        # Private in `Trainer`; `tests/train/test_corpora.py` fails when it moves.
        self._restore = partial(trainer._load_rng_state, str(checkpoint))

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

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._start = state.global_step

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            place = self._stream.place((state.global_step - self._start) * self._rows)
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / PLACE, place)


def read_place(checkpoint: Path) -> dict[str, Any]:
    """Return the place that a checkpoint was written at.

    Raises:
        FastDraftError: it has none: it was trained on something else than a stream.
    """
    try:
        return dict(json.loads((checkpoint / PLACE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FastDraftError(
            f"{checkpoint} holds no place of a stream ({PLACE}); it was not trained on one"
        ) from None
