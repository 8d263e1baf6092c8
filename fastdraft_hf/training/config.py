"""What a recipe says about a training stage. (The trainer's own config is in `trainer.py`.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._schema import setting
from fastdraft_hf.data.config import Source


@dataclass
class TrainConfig:
    """One training stage: pre-training, continued pre-training or alignment."""

    sources: list[Source] = setting([], "what is read; align takes generated sets only")
    max_train_tokens: int = setting(1_000_000, "token budget, such as 5B, padding not counted")
    max_minutes: float | None = setting(
        None,
        "cut the token budget to what this machine trains in this time; the rate is measured "
        "before the first step and the cut is fixed then",
    )
    seq_length: int = setting(512, "tokens a sequence")
    per_device_train_batch_size: int = setting(8, "sequences a step and device")
    gradient_accumulation_steps: int = setting(1, "batches a step")
    learning_rate: float = setting(1e-3, "peak learning rate (AdamW: embeddings, head, norms)")
    matrix_optimizer: Literal["muon", "adamw"] = setting(
        "muon", "optimizer of the layers' matrices; everything else is AdamW's"
    )
    matrix_learning_rate: float | None = setting(
        4e-3, "peak learning rate of the layers' matrices; learning_rate if empty"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = setting(
        "cosine", "how the rate falls after warm-up"
    )
    warmup: float = setting(0.03, "share of the steps over which the rate rises")
    weight_decay: float = setting(
        0.0, "of the layers' matrices (with adamw: of all but norms and biases)"
    )
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    eval_sequences: int = setting(16, "held-out sequences for the loss curve; 0 for none")
    logging_steps: int = setting(10, "steps between lines of the log")
    save_steps: int = setting(50, "steps between checkpoints; a killed run goes on from the last")
    trainer_args: dict[str, Any] = setting(
        {}, "further fields of TRL's SFTConfig, as they are called there"
    )

    def __post_init__(self) -> None:
        for name in ("max_train_tokens", "seq_length", "per_device_train_batch_size"):
            if getattr(self, name) < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise FastDraftError(f"warmup: a share of at least 0 and below 1, got {self.warmup}")
        if self.learning_rate <= 0:
            raise FastDraftError(f"learning_rate: must be above 0, got {self.learning_rate}")
        # An empty step is no training at all, and rounding it up would overspend the budget.
        if self.max_train_tokens < self.step_tokens:
            raise FastDraftError(
                f"max_train_tokens: {self.max_train_tokens:,} is below one step of "
                f"{self.step_tokens:,} tokens (per_device_train_batch_size x "
                "gradient_accumulation_steps x seq_length)"
            )

    @property
    def step_tokens(self) -> int:
        """Tokens a step on one device, full sequences."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return batch * self.seq_length
