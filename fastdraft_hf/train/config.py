"""What a recipe says about a training stage. (The trainer's own config is in `arguments.py`.)"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, StrictBool

from fastdraft_hf._config import Count, Key, Number, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.sources import Source, expand_presets


class LoraSettings(Section):
    """Low-rank adapters (PEFT): re-align a draft, to a fine-tuned target say, and merge them."""

    r: Count = Field(16, description="rank")
    alpha: Count = Field(32, description="scale; the update is multiplied by alpha / r")
    dropout: Number = Field(0.0, description="of the adapters' inputs, while training")
    target_modules: list[str] | str = Field(
        "all-linear",
        description="names of the modules that get one; all-linear: every layer's, not the head",
    )

    def check_values(self) -> None:
        if self.r < 1:
            raise FastDraftError(f"r: must be at least 1, got {self.r}")
        named = (
            [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        )
        for name in named:
            if name.split(".")[-1] in ("lm_head", "embed_out", "embed_tokens", "wte"):
                raise FastDraftError(
                    f"target_modules: {name} is the head or tied to it, which is trained as it is "
                    "or not at all; leave it out"
                )
        if not 0 <= self.dropout < 1:
            raise FastDraftError(f"dropout: at least 0 and below 1, got {self.dropout}")


class TrainConfig(Section):
    """One training stage: pre-training, continued pre-training or alignment."""

    sources: list[Source] = Field([], description="what is read; align takes generated sets only")
    max_train_tokens: Count = Field(
        1_000_000, description="token budget, such as 5B, padding not counted"
    )
    streaming: StrictBool | None = Field(
        None,
        description=(
            "read text while training instead of tokenizing it first; by default for mixtures "
            "with a source on the Hub; not for align"
        ),
    )
    max_minutes: Number | None = Field(
        None,
        description=(
            "cut the token budget to what this machine trains in this time; the rate is measured "
            "before the first step and the cut is fixed then"
        ),
    )
    max_length: Count = Field(512, description="tokens a sequence")
    per_device_train_batch_size: Count = Field(8, description="sequences a step and device")
    gradient_accumulation_steps: Count = Field(1, description="batches a step")
    learning_rate: Number = Field(
        1e-3, description="peak learning rate (AdamW: embeddings, head, norms)"
    )
    matrix_optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="optimizer of the layers' matrices; everything else is AdamW's"
    )
    matrix_learning_rate: Number | None = Field(
        4e-3, description="peak learning rate of the layers' matrices; learning_rate if empty"
    )
    objective: dict[Key, Number] | str = Field(
        "auto",
        description=(
            "weighted terms such as {ce: 0.5, kl: 0.5}, of ce, kl, rkl, jsd, tvd, nla, lk_hybrid; "
            "or the name of a term or of a combination of the paper: ce, ce_kl, ce_tvd, kl, tvd; "
            "auto: nla in align where the target's distribution is stored or online, else ce"
        ),
    )
    target_distribution: Literal["auto", "none", "stored", "online"] = Field(
        "auto",
        description=(
            "where terms besides ce get the target's distribution: stored by stage logits (align "
            "only), online from the target itself; auto: none for ce, else stored if the recipe "
            "has the section logits, else online"
        ),
    )
    temperature: Number = Field(
        1.0, description="temperature of both distributions in every term but ce"
    )
    sampled_softmax: Count | None = Field(
        8192,
        description=(
            "tokens of the vocabulary that a step scores besides those that occur in it, drawn "
            "anew each time; all if empty; with an online target all are scored"
        ),
    )
    lora: LoraSettings | None = Field(
        None,
        description="train low-rank adapters of the layers and merge them, instead of every weight",
    )
    start_weight: Number = Field(
        0.0,
        description=(
            "share of the weights that the stage began with in the finished ones, which are "
            "averaged with the trained ones (WiSE-FT): for a draft that goes on with other text "
            "and should not lose what it knew"
        ),
    )
    lr_scheduler_type: Literal[
        "cosine", "linear", "constant_with_warmup", "warmup_stable_decay"
    ] = Field(
        "cosine", description="how the rate falls after warm-up, over the tokens of the budget"
    )
    warmup: Number = Field(0.03, description="share of the budget over which the rate rises")
    decay: Number = Field(
        0.2, description="warmup_stable_decay: share of the budget over which it falls"
    )
    weight_decay: Number = Field(
        0.0, description="of the layers' matrices (with adamw: of all but norms and biases)"
    )
    max_grad_norm: Number = Field(1.0, description="gradients are clipped to this norm")
    eval_sequences: Count = Field(
        16, description="held-out sequences for the loss curve; 0 for none"
    )
    logging_steps: Count = Field(10, description="steps between lines of the log")
    save_steps: Count = Field(
        50, description="steps between checkpoints; a killed run goes on from the last"
    )
    trainer_args: dict[Key, Any] = Field(
        {}, description="further fields of TRL's SFTConfig, as they are called there"
    )

    def check_values(self) -> None:
        self.sources = expand_presets(self.sources)
        self.require_positive("max_train_tokens", "max_length", "per_device_train_batch_size")
        if not 0 <= self.start_weight < 1:
            raise FastDraftError(
                f"start_weight: a share of at least 0 and below 1, got {self.start_weight}"
            )
        if self.start_weight and self.lora is not None:
            raise FastDraftError(
                "start_weight: adapters keep the weights already; lower lora.alpha"
            )
        if not 0 <= self.warmup < 1:
            raise FastDraftError(f"warmup: a share of at least 0 and below 1, got {self.warmup}")
        if not 0 < self.decay <= 1 - self.warmup:
            raise FastDraftError(
                f"decay: a share above 0 that leaves room for warmup ({self.warmup}), got "
                f"{self.decay}"
            )
        if self.sampled_softmax is not None and self.sampled_softmax < 1:
            raise FastDraftError(
                f"sampled_softmax: must be at least 1, or empty, got {self.sampled_softmax}"
            )
        if self.temperature <= 0:
            raise FastDraftError(f"temperature: must be above 0, got {self.temperature}")
        if self.objective not in ("auto", "ce"):  # a wrong one is said before anything is generated
            from fastdraft_hf.train.objectives import Objective

            try:
                Objective(self.objective)
            except ValueError as error:
                raise FastDraftError(str(error)) from error
        if self.learning_rate <= 0:
            raise FastDraftError(f"learning_rate: must be above 0, got {self.learning_rate}")
        # An empty step is no training at all, and rounding it up would overspend the budget.
        if self.max_train_tokens < self.step_tokens:
            raise FastDraftError(
                f"max_train_tokens: {self.max_train_tokens:,} is below one step of "
                f"{self.step_tokens:,} tokens (per_device_train_batch_size x "
                "gradient_accumulation_steps x max_length)"
            )

    @property
    def streams(self) -> bool:
        """Whether text is read while training, `streaming` resolved."""
        if self.streaming is not None:
            return self.streaming
        return any(s.kind == "hub" for s in self.sources)

    @property
    def needs_distribution(self) -> bool:
        """Whether a term besides cross-entropy on labels is asked for."""
        names = {self.objective} if isinstance(self.objective, str) else set(self.objective)
        return not names <= {"ce", "auto"}

    @property
    def step_tokens(self) -> int:
        """Tokens a step on one device, full sequences."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return batch * self.max_length
