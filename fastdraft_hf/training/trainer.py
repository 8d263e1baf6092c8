"""`DraftDistillationTrainer`: TRL's `SFTTrainer` with the draft's head done in one pass.

A draft is mostly vocabulary: the head is nine tenths of its training time. This trainer keeps
everything of `SFTTrainer` (data collation, checkpoints, reporting, scale-out) and replaces the
loss: the model runs up to its last hidden states, and `fused_cross_entropy` takes loss and
gradients from there, on the labelled tokens only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from fastdraft_hf.training.head import fused_cross_entropy
from fastdraft_hf.training.optimizer import MuonWithAdamW

_PAPER = {
    "title": "FastDraft: How to Train Your Draft",
    "id": "2411.11055",
    # docstyle-ignore
    "citation": (
        "@inproceedings{zafrir2025fastdraft,\n"
        "    title     = {{FastDraft: How to Train Your Draft}},\n"
        "    author    = {Ofir Zafrir and Igor Margulis and Dorin Shteyman and Shira Guskin and "
        "Guy Boudoukh},\n"
        "    year      = 2025,\n"
        "    booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},\n"
        "    eprint    = {arXiv:2411.11055}\n"
        "}"
    ),
}


@dataclass
class DraftDistillationConfig(SFTConfig):
    """`SFTConfig` with what the draft's trainer adds and with defaults that fit it."""

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

    def __post_init__(self) -> None:
        if self.head_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"head_dtype must be auto, float32 or bfloat16, not {self.head_dtype!r}"
            )
        if self.matrix_optimizer not in ("muon", "adamw"):
            raise ValueError(
                f"matrix_optimizer must be muon or adamw, not {self.matrix_optimizer!r}"
            )
        super().__post_init__()


def has_fast_bf16(device: torch.device | str) -> bool:
    """Return whether ``device`` multiplies bfloat16 matrices in hardware."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.device(device).type == "cpu":
        # A private query, there being no public one; `test_trainer.py` fails when it moves.
        # Emulated bfloat16 (a CPU with AVX-512 but no bf16 products) is slower than float32.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


class DraftDistillationTrainer(SFTTrainer):
    """Trains a draft on token ids with labels.

    The data set holds ``input_ids`` and ``labels`` of equal length (``labels`` are -100 where no
    loss is taken), or anything else that `SFTTrainer` prepares into these.

    Args:
        args: a `DraftDistillationConfig`.
        **kwargs: as for `SFTTrainer`.

    Raises:
        ValueError: ``args`` is of another kind, or asks for a loss that is not cross-entropy.
    """

    _tag_names = ["trl", "fastdraft", "speculative-decoding"]
    _name = "FastDraft"
    _paper = _PAPER

    def __init__(self, *, args: DraftDistillationConfig, **kwargs: Any) -> None:
        if not isinstance(args, DraftDistillationConfig):
            raise ValueError(f"args must be a DraftDistillationConfig, got {type(args).__name__}")
        if args.loss_type != "nll" or args.label_smoothing_factor:
            raise ValueError("loss_type must be 'nll' and label_smoothing_factor 0")
        super().__init__(args=args, **kwargs)
        fast = has_fast_bf16(self.accelerator.device)
        wanted = args.head_dtype
        if wanted == "auto":
            wanted = "bfloat16" if fast else "float32"
        self.head_dtype: torch.dtype = getattr(torch, wanted)
        self.optimizer: torch.optim.Optimizer | None
        self._log_time, self._log_tokens = time.monotonic(), 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean cross-entropy of the labelled tokens.

        With ``num_items_in_batch`` (labelled tokens of the whole step, over accumulation and
        processes) the sum is divided by it, as `Trainer` expects.
        """
        if return_outputs:  # somebody wants logits: TRL's own way makes them
            return super().compute_loss(model, inputs, True, num_items_in_batch)
        mode = "train" if model.training else "eval"
        labels = inputs["labels"][:, 1:]
        hidden = self._last_hidden_states(model, inputs)[:, :-1]
        labelled = labels != -100
        unwrapped = self.accelerator.unwrap_model(model)
        head = unwrapped.get_output_embeddings()
        config = unwrapped.config.get_text_config()
        result = fused_cross_entropy(
            hidden[labelled],
            head.weight,
            labels[labelled],
            head.bias,
            scale=_logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
            dtype=self.head_dtype,
        )
        count = labelled.sum()
        correct = self.accelerator.gather_for_metrics(result.correct).sum()
        total = self.accelerator.gather_for_metrics(count).sum()
        self._metrics[mode]["mean_token_accuracy"].append((correct / total.clamp(min=1)).item())
        if num_items_in_batch is None:
            return result.loss / count.clamp(min=1)
        loss = result.loss / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices:
            # The count is of all processes, and DDP averages the gradients over them.
            loss = loss * self.accelerator.num_processes
        return loss

    def _last_hidden_states(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Return [batch, sequence, hidden] as it enters the head.

        The whole model is called, so that wrappers (DDP, FSDP) see an ordinary forward pass, with
        ``logits_to_keep=1``: one position goes through the head, and the decoder's output is read
        by a forward hook.
        """
        kept: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            kept.append(output.last_hidden_state)

        unwrapped = self.accelerator.unwrap_model(model)
        handle = unwrapped.get_decoder().register_forward_hook(keep)
        try:
            rest = {k: v for k, v in inputs.items() if k != "labels"}
            model(**rest, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        return kept[0]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As `Trainer`, with an optimizer and a learning rate of their own for the matrices."""
        given: torch.optim.Optimizer | None = self.optimizer
        if given is not None:
            return given
        tables = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        in_tables = {id(p) for module in tables for p in module.parameters()}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = {id(p) for p in trained if p.ndim == 2} - in_tables
        rate = self.args.matrix_learning_rate or self.args.learning_rate
        if self.args.matrix_optimizer == "muon":
            if not matrices:
                raise ValueError("matrix_optimizer='muon': the model has no trainable matrices")
            self.optimizer = muon = MuonWithAdamW(
                [p for p in trained if id(p) in matrices],
                [p for p in trained if id(p) not in matrices],
                matrix_lr=rate,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
            return muon
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        for group in list(optimizer.param_groups):
            chosen = [p for p in group["params"] if id(p) in matrices]
            if chosen:
                group["params"] = [p for p in group["params"] if id(p) not in matrices]
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the rate and, instead of TRL's count of this run, the tokens seen over all runs."""
        if self.model.training and "loss" in logs:
            now, seen = time.monotonic(), self.state.num_input_tokens_seen
            if self._log_tokens:
                logs["tokens_per_second"] = round(
                    (seen - self._log_tokens) / max(now - self._log_time, 1e-9), 1
                )
            self._log_time, self._log_tokens = now, seen
            self._metrics["train"].pop("num_tokens", None)
        super().log(logs, start_time)


def _logit_scale(config: Any) -> float:
    """Return the factor a family applies to its logits (1 for most)."""
    if getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / float(config.logits_scaling)
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        return float(config.logit_scale)
    return 1.0


__all__ = [
    "DraftDistillationConfig",
    "DraftDistillationTrainer",
    "has_fast_bf16",
]
