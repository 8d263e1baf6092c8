"""A budget in tokens: when training ends, and a learning rate that follows the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.optimization import get_scheduler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from fastdraft_hf._errors import FastDraftError

# transformers' schedules count in steps; their shape is sampled at this many.
_POINTS = 1_000_000

WARMUP_STABLE_DECAY = "warmup_stable_decay"
DECAY_SHARE = 0.2


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


def schedule_shape(args: Any) -> Callable[[float], float]:
    """Return the factor of the learning rate as a function of the share of the budget, 0 to 1.

    Args:
        args: the trainer's config; ``lr_scheduler_type``, ``warmup_steps`` (a share) and
            ``lr_scheduler_kwargs`` (``num_decay_steps`` is a share) are read.

    Raises:
        FastDraftError: the schedule is not a function of progress alone.
    """
    kwargs = dict(args.lr_scheduler_kwargs or {})
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if name == WARMUP_STABLE_DECAY:
        kwargs["num_decay_steps"] = round(kwargs.get("num_decay_steps", DECAY_SHARE) * _POINTS)
    schedule = get_scheduler(
        name,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),  # required, but not used
        num_warmup_steps=args.get_warmup_steps(_POINTS),
        num_training_steps=_POINTS,
        scheduler_specific_kwargs=kwargs,
    )
    shapes = getattr(schedule, "lr_lambdas", None)
    if shapes is None:
        raise FastDraftError(
            f"lr_scheduler_type: {name} cannot follow a token budget; use max_steps"
        )
    return lambda share: float(shapes[0](min(1.0, share) * _POINTS))
