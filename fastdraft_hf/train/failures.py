"""What the trainer says when a loss or a gradient is no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.train.arguments import DraftDistillationConfig
from fastdraft_hf.train.checkpoints import newest_complete
from fastdraft_hf.train.modules import rows_of_batch


class NonFiniteLossError(FastDraftError):
    """The loss or its gradient became infinite or no number; the weights were not touched."""

    @classmethod
    def of(
        cls,
        what: str,
        args: DraftDistillationConfig,
        step: int,
        rows: Any,
        batches: list[dict[str, Any]],
    ) -> NonFiniteLossError:
        """Return the error, naming the step, the rows and the last good checkpoint.

        Args:
            what: happened.
            args: the trainer's.
            step: steps that were finished before.
            rows: the dataset as it was given to the trainer; ``None`` in an evaluation.
            batches: inputs of the model.
        """
        where = f"evaluation after step {step}" if rows is None else f"step {step + 1}"
        good = newest_complete(Path(args.output_dir), step)
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        rates = f"learning_rate {args.learning_rate:g}"
        if args.matrix_learning_rate:
            rates += f", matrix_learning_rate {args.matrix_learning_rate:g}"
        return cls(
            f"{where}: {what} on {rows_of_batch(rows, batches)}; {kept}. Look at these rows, or "
            f"lower the learning rate ({rates})"
        )


__all__ = ["NonFiniteLossError"]
