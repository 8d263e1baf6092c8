"""`DraftDistillationConfig`: TRL's `SFTConfig` with what the draft's trainer adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from fastdraft_hf._config import parse_count
from fastdraft_hf.train.budget import schedule_shape
from fastdraft_hf.train.objectives import Objective


@dataclass
class DraftDistillationConfig(SFTConfig):
    """`SFTConfig` with what the draft's trainer adds and with defaults that fit it.

    Different from `SFTConfig`: ``bf16`` is chosen by the device (on where a GPU has it, else off)
    and ``gradient_checkpointing`` is off, since a draft is small. ``hub_strategy`` is ``end``: one
    commit, of the finished draft.
    """

    # A preset's name stays a string; a mapping given as JSON on the command line is parsed.
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "objective", "teacher_model_init_kwargs"]

    bf16: bool | None = field(
        default=None,
        metadata={"help": "Mixed precision in bfloat16; by default on where a GPU has it."},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward pass; a draft rarely needs it."},
    )
    hub_strategy: str = field(
        default="end",
        metadata={"help": "When to push with push_to_hub: end, or every_save, checkpoint, ..."},
    )
    # Only str: on the command line, bool in the type would refuse every name.
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={"help": "Count the tokens read: non_padding, all or no; the log has their rate."},
    )
    objective: dict[str, Any] | str | None = field(
        default="ce",
        metadata={
            "help": "Weighted sum of terms, such as {ce: 0.5, kl: 0.5}, of ce, kl, rkl, jsd, tvd, "
            "nla, lk_hybrid; or the name of one term, or of a combination of the FastDraft paper: "
            "ce, ce_kl, ce_tvd, kl, tvd."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of both distributions in every term but ce. Stored distributions "
            "must have been made at it."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The target as an online teacher, for objectives that need its distribution "
            "when the dataset does not store it."
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Further arguments of from_pretrained for the online target."},
    )
    max_train_tokens: str | None = field(
        default=None,
        metadata={
            "help": "Budget in tokens that are no padding, such as 5B, 200M or 50000. Training "
            "ends with the first step that reaches it and the learning rate follows it; warm-up "
            "is then a share (warmup_steps below 1). Replaces max_steps and num_train_epochs."
        },
    )
    decay_share: float = field(
        default=0.2,
        metadata={
            "help": "With lr_scheduler_type warmup_stable_decay and a token budget: the share of "
            "the budget over which the rate falls at the end."
        },
    )
    matrix_optimizer: str = field(
        default="adamw",
        metadata={
            "help": "Optimizer of the layers' matrices: muon (with AdamW for everything else) or "
            "adamw, which leaves the choice to `optim`."
        },
    )
    matrix_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the layers' matrices; learning_rate if unset."},
    )
    head_dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the head's matrix products: float32, bfloat16, or auto (bfloat16 "
            "where the device multiplies it in hardware). Sums stay in float32."
        },
    )
    sampled_softmax: int | None = field(
        default=None,
        metadata={
            "help": "While training, score the ids that occur in a batch and this many others, "
            "drawn anew each time, instead of the whole vocabulary. With an online target, with "
            "capped logits (Gemma 2) and in evaluation every id is scored."
        },
    )

    def __post_init__(self) -> None:
        if self.head_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"head_dtype must be auto, float32 or bfloat16, not {self.head_dtype!r}"
            )
        if self.matrix_optimizer not in ("muon", "adamw"):
            raise ValueError(
                f"matrix_optimizer must be muon or adamw, not {self.matrix_optimizer!r}"
            )
        if self.sampled_softmax is not None and self.sampled_softmax < 1:
            raise ValueError(f"sampled_softmax must be at least 1, got {self.sampled_softmax}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share must be above 0 and at most 1, got {self.decay_share}")
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and is_torch_bf16_gpu_available()
        super().__post_init__()
        Objective("ce" if self.objective is None else self.objective)  # refuses what there is not
        if self.max_train_tokens is not None:
            self._take_token_budget()

    def _take_token_budget(self) -> None:
        try:
            budget = parse_count(str(self.max_train_tokens))
        except ValueError as error:
            raise ValueError(f"max_train_tokens: {error}; write 5B, 200M or 50000") from None
        if budget < 1:
            raise ValueError(f"max_train_tokens must be at least 1, got {budget}")
        if self.max_steps > 0:
            raise ValueError("max_train_tokens and max_steps are two budgets; give one of them")
        if self.warmup_steps >= 1:
            raise ValueError(
                f"warmup_steps: with max_train_tokens it is a share below 1, not "
                f"{self.warmup_steps:g} steps"
            )
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if 0 < (getattr(self, name) or 0) < 1:
                raise ValueError(
                    f"{name}: with max_train_tokens the number of steps is not known beforehand, "
                    f"so it is a number of steps, not a share of them ({getattr(self, name):g})"
                )
        # The budget is counted in tokens seen, so they have to be.
        self.include_num_input_tokens_seen = "non_padding"
        schedule_shape(self)  # refuses one that cannot follow tokens

    def __getstate__(self) -> dict[str, Any]:
        """Leave the token out of pickles: `Trainer` writes its arguments beside the weights."""
        return {**self.__dict__, "hub_token": None}

    @property
    def token_budget(self) -> int | None:
        """``max_train_tokens`` as a number."""
        return None if self.max_train_tokens is None else parse_count(str(self.max_train_tokens))


def has_fast_bf16(device: torch.device | str) -> bool:
    """Return whether ``device`` multiplies bfloat16 matrices in hardware."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.device(device).type == "cpu":
        # A private query, there being no public one; `test_trainer.py` fails when it moves.
        # Emulated bfloat16 (a CPU with AVX-512 but no bf16 products) is slower than float32.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
