"""Which checkpoint a killed run goes on from: the newest that was written whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_MARK = "complete"


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


def newest_complete(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in ``folder``."""
    return next((path for path in _newest_first(folder) if (path / _MARK).exists()), None)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in ``folder``; remove the torn ones after it."""
    good = newest_complete(folder)
    for path in _newest_first(folder):
        if path == good:
            break
        shutil.rmtree(path)
    return good
