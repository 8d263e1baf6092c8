"""`DraftDistillationConfig`: TRL's `SFTConfig` plus the draft trainer's own settings."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.optimization import get_scheduler
from trl import SFTConfig

from fastdraft_hf._config import parse_count
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.train.objectives import Objective

# transformers' schedules count in steps; their shape is sampled at this many.
_POINTS = 1_000_000
_WARMUP_STABLE_DECAY, _DECAY_SHARE = "warmup_stable_decay", 0.2


def _field(default: Any, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass
class DraftDistillationConfig(SFTConfig):
    """Configuration of `DraftDistillationTrainer`; a recipe's training stages hold these fields.

    All of `SFTConfig`'s fields are accepted. Some have defaults that suit a small draft.

    Raises:
        FastDraftError: a value is out of range. The message begins with the field.
        ValueError: transformers or TRL refuse a value of theirs.
    """

    # A preset's name stays a string; a mapping given as JSON on the command line is parsed.
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "objective", "teacher_model_init_kwargs"]

    # --- objective and teacher
    objective: dict[str, Any] | str = _field(
        "auto",
        "Weighted sum of terms, such as {ce: 0.5, kl: 0.5}, of ce, kl, rkl, jsd, tvd, nla and "
        "lk_hybrid; or the name of a term or of a combination of the FastDraft paper: ce, ce_kl, "
        "ce_tvd, kl, tvd. auto: nla where the teacher's distribution is known, else ce.",
    )
    temperature: float = _field(
        1.0,
        "Temperature of both distributions in every term but ce. Stored distributions must have "
        "been made at it.",
    )
    teacher_model_name_or_path: str | None = _field(
        None,
        "Online teacher (the target), for objectives that need its distribution when the dataset "
        "does not store it.",
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = _field(
        None,
        "Arguments of from_pretrained for the online teacher.",
    )
    sampled_softmax: int | None = _field(
        8192,
        "While training, score the ids of a batch and this many random others instead of the whole "
        "vocabulary; all if empty. With an online teacher, with capped logits (Gemma 2) and in "
        "evaluation every id is scored.",
    )
    head_dtype: str = _field(
        "auto",
        "Type of the head's matrix products: float32, bfloat16, or auto (bfloat16 where the device "
        "multiplies it in hardware). Sums stay in float32.",
    )
    num_parallel_tokens: int = _field(
        1,
        "Train the draft to guess this many tokens in one pass (PARD, docs/parallel.md): the next "
        "one, and the others at masks behind the text. It still drafts one by one as well.",
    )
    # --- budget
    max_train_tokens: int | str | None = _field(
        None,
        "Budget in tokens, padding not counted, such as 5B, 200M or 50000. Training ends with the "
        "first step that reaches it, and the learning rate follows it. Replaces max_steps and "
        "num_train_epochs.",
    )
    max_minutes: float | None = _field(
        None,
        "Cut max_train_tokens to what this machine trains in this time. The rate is measured "
        "over the first steps; the cut is then fixed.",
    )
    warmup_steps: float = _field(0.03, "Warm-up: a share of the budget if below 1, else steps.")
    lr_scheduler_type: str = _field(
        "cosine",
        "How the learning rate falls after warm-up: cosine, linear, constant_with_warmup, "
        "warmup_stable_decay (over the last num_decay_steps of lr_scheduler_kwargs, a share of the "
        "budget, by default 0.2), ...",
    )
    # --- optimizer
    use_muon: bool = _field(
        True,
        "Train the layers' matrices with Muon and everything else with AdamW; if false, `optim` "
        "trains everything. FSDP and DeepSpeed need false.",
    )
    muon_learning_rate: float = _field(4e-3, "Peak learning rate of the matrices under Muon.")
    learning_rate: float = _field(1e-3, "Peak learning rate of AdamW: embeddings, head, norms.")
    adam_beta2: float = _field(0.95, "Beta2 of AdamW.")
    start_weight: float = _field(
        0.0,
        "Share of the initial weights in the trained ones, which are averaged at the end "
        "(WiSE-FT), so that a draft does not forget.",
    )
    # --- defaults that differ from SFTConfig's
    max_length: int | None = _field(512, "Longest sequence, in tokens; longer rows are cut.")
    bf16: bool | None = _field(None, "bfloat16 mixed precision; by default where it is fast.")
    gradient_checkpointing: bool = _field(False, "Recompute activations in the backward pass.")
    # Only str: on the command line, bool in the type would refuse every name.
    include_num_input_tokens_seen: str = _field(
        "non_padding",
        "Count the tokens: non_padding, all or no.",
    )
    logging_nan_inf_filter: bool = _field(False, "Leave losses that are not finite out of the log.")
    save_steps: float = _field(50, "Steps between checkpoints.")
    save_total_limit: int | None = _field(2, "Checkpoints to keep.")

    if TYPE_CHECKING:
        use_cpu: bool = False  # mypy does not follow transformers

    def __post_init__(self) -> None:
        if self.push_to_hub:
            raise FastDraftError("push_to_hub: run `fastdraft push` on the trained draft's folder")
        if self.max_train_tokens is not None:
            try:
                self.max_train_tokens = parse_count(str(self.max_train_tokens))
            except ValueError as error:
                raise FastDraftError(
                    f"max_train_tokens: {error}; write 5B, 200M or 50000"
                ) from None
        if self.bf16 is None:
            on_cpu = bool(self.use_cpu) or not torch.accelerator.is_available()
            self.bf16 = not self.fp16 and has_fast_bf16("cpu" if on_cpu else "cuda")
            if on_cpu and self.bf16:
                self.use_cpu = True  # transformers asks for it
        super().__post_init__()
        check_settings(self)
        if self.max_train_tokens is not None:
            self._check_budget()

    def _check_budget(self) -> None:
        if self.max_steps > 0:
            raise FastDraftError("max_train_tokens: max_steps is another budget; give one of them")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if 0 < (getattr(self, name) or 0) < 1:
                raise FastDraftError(
                    f"{name}: with max_train_tokens the number of steps is not known beforehand; "
                    f"give a number of steps instead of a share ({getattr(self, name):g})"
                )
        self.include_num_input_tokens_seen = "non_padding"  # the budget is counted in these
        schedule_shape(self)  # refuses a schedule that cannot follow tokens


def check_settings(config: Any) -> None:
    """Check the values of a `DraftDistillationConfig` or of a recipe's section with its fields.

    Raises:
        FastDraftError: a value is out of range. The message begins with the field.
    """
    if config.objective != "auto":
        Objective(config.objective)
    if config.head_dtype not in ("auto", "float32", "bfloat16"):
        raise FastDraftError(
            f"head_dtype: must be auto, float32 or bfloat16, got {config.head_dtype!r}"
        )
    step = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
    for name in ("max_train_tokens", "sampled_softmax", "num_parallel_tokens", *step):
        if (value := getattr(config, name)) is not None and value < 1:
            raise FastDraftError(f"{name}: must be at least 1, got {value}")
    for name in ("temperature", "learning_rate", "muon_learning_rate", "max_minutes"):
        if (value := getattr(config, name)) is not None and not value > 0:
            raise FastDraftError(f"{name}: must be above 0, got {value}")
    for name in ("start_weight", "adam_beta1", "adam_beta2", "label_smoothing_factor"):
        if not 0 <= (value := getattr(config, name)) < 1:
            raise FastDraftError(f"{name}: must be at least 0 and below 1, got {value}")
    for name, value in vars(config).items():
        # A negative default, such as that of max_steps, means that nothing is set.
        unset = getattr(DraftDistillationConfig, name, None)
        if isinstance(value, int | float) and not 0 <= value < math.inf and value != unset:
            raise FastDraftError(f"{name}: must be a finite number of at least 0, got {value}")
    if config.max_train_tokens is None:
        if config.max_minutes is not None:
            raise FastDraftError("max_minutes: it cuts max_train_tokens, which is not set")
        return
    if not 0 <= config.warmup_steps < 1:
        raise FastDraftError(
            "warmup_steps: with max_train_tokens it is a share of the budget, at least 0 and "
            f"below 1, got {config.warmup_steps:g}"
        )
    if config.lr_scheduler_type == _WARMUP_STABLE_DECAY:
        kwargs = config.lr_scheduler_kwargs
        decay = (kwargs if isinstance(kwargs, dict) else {}).get("num_decay_steps", _DECAY_SHARE)
        if not 0 < decay <= 1 - config.warmup_steps:
            raise FastDraftError(
                "lr_scheduler_kwargs.num_decay_steps: with max_train_tokens it is a share of the "
                f"budget, above 0, that leaves room for warmup_steps ({config.warmup_steps:g}); "
                f"got {decay}"
            )


def schedule_shape(args: Any) -> Callable[[float], float]:
    """Return the factor of the learning rate as a function of the share of the budget, 0 to 1.

    ``warmup_steps`` and ``num_decay_steps`` are shares as well.

    Raises:
        FastDraftError: the schedule is not a function of progress alone.
    """
    kwargs = dict(args.lr_scheduler_kwargs or {})
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if name == _WARMUP_STABLE_DECAY:
        kwargs["num_decay_steps"] = round(kwargs.get("num_decay_steps", _DECAY_SHARE) * _POINTS)
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


def has_fast_bf16(device: torch.device | str) -> bool:
    """Return whether ``device`` multiplies bfloat16 matrices in hardware."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_available() and bool(
            torch.cuda.is_bf16_supported(including_emulation=False)
        )
    if torch.device(device).type == "cpu":
        # Private, as there is no public query; `test_trainer.py` fails when it moves. Emulated
        # bfloat16 (a CPU with AVX-512 but no bf16 products) is slower than float32.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
