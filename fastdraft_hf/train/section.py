"""A recipe's training stages: `DraftDistillationConfig`'s fields beside ``sources``."""

from __future__ import annotations

import dataclasses
import enum
import types
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    StrictBool,
    TypeAdapter,
    create_model,
    model_serializer,
    model_validator,
)

from fastdraft_hf._config import Count, Key, Number, Positive, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.sources import Source

if TYPE_CHECKING:
    from fastdraft_hf.train.config import DraftDistillationConfig

# Fields that the stage sets. A recipe that sets them would detach the run from its folder, its
# budget or its checkpoints.
_BUDGET = "the budget is max_train_tokens"
_RESUMES = "a killed run resumes from its last checkpoint by itself"
_SEED = "the recipe's seed is used"
_LAUNCH = "it belongs in the configuration of `accelerate launch`"
_OURS = {
    "output_dir": "checkpoints go into the stage's folder",
    **dict.fromkeys(("max_steps", "num_train_epochs"), _BUDGET),
    **dict.fromkeys(("resume_from_checkpoint", "ignore_data_skip"), _RESUMES),
    "save_strategy": "checkpoints are written every save_steps, so that a killed run can resume",
    "save_only_model": "a killed run needs the optimizer's state to resume",
    "load_best_model_at_end": "the last weights are kept",
    "auto_find_batch_size": "a resumed run must read the rows that follow",
    "eval_strategy": "held-out rows are evaluated every eval_steps; eval_rows: 0 turns it off",
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "use_cpu": "the recipe's device decides",
    "push_to_hub": "run `fastdraft push` on the finished run",
    "teacher_model_name_or_path": "the recipe's target is the teacher; set target_distribution",
    "dataset_kwargs": "sources decide what is read",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _LAUNCH),
}
_NEVER = ("do_train", "do_eval", "do_predict", "local_rank", "debug", "fp16_full_eval")


class LoraSettings(Section):
    """Low-rank adapters by the names of PEFT's `LoraConfig`; merged when training ends."""

    r: Positive = Field(16, description="rank")
    lora_alpha: Number = Field(32, description="scale; the update is multiplied by lora_alpha / r")
    lora_dropout: Number = Field(0.0, ge=0, lt=1, description="dropout of the adapters' inputs")
    target_modules: list[str] | str = Field(
        "all-linear", description="modules that get an adapter; all-linear: all but the head"
    )

    def check_values(self) -> None:
        named = self.target_modules
        for name in [named] if isinstance(named, str) else named:
            if name.split(".")[-1] in ("lm_head", "embed_out", "embed_tokens", "wte"):
                raise FastDraftError(
                    f"target_modules: {name} is the head or tied to it, and the head takes no "
                    "adapter; leave it out"
                )


class TrainingSection(Section):
    """One training stage. `training_section` adds the fields of `DraftDistillationConfig`."""

    sources: list[Source] = Field([], description="what is read; align reads generated sets only")
    eval_rows: Count = Field(16, ge=0, description="held-out rows for the loss curve; 0 for none")
    streaming: StrictBool | None = Field(
        None,
        description=(
            "read text while training instead of tokenizing it first; by default for mixtures "
            "with a dataset on the Hub; not for align"
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
    lora: LoraSettings | None = Field(
        None, description="train low-rank adapters of the layers and merge them"
    )

    # Fields that are always written out; of the others those that differ from their defaults.
    SHOWN: ClassVar[frozenset[str]] = frozenset()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="before")
    @classmethod
    def _refuse_ours(cls, data: Any) -> Any:
        for name, why in _OURS.items():
            if isinstance(data, dict) and name in data:
                raise FastDraftError(f"{name}: not in a recipe; {why}")
        return data

    @model_serializer(mode="wrap")
    def _written(self, handler: Any) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            name: value
            for name, value in handler(self).items()
            if name in self.SHOWN
            or getattr(self, name) != fields[name].get_default(call_default_factory=True)
        }

    def check_values(self) -> None:
        from fastdraft_hf.train.config import check_settings

        check_settings(self)
        if self.max_length is None:
            raise FastDraftError("max_length: must be at least 1, got None")
        if self.start_weight and self.lora is not None:
            raise FastDraftError(
                "start_weight: adapters keep the weights already; lower lora.lora_alpha"
            )
        # A budget below one step trains nothing, and rounding it up would overspend it.
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
        return any(source.kind == "hub" for source in self.sources)

    @property
    def needs_distribution(self) -> bool:
        """Whether the objective has a term besides cross-entropy on labels."""
        names = {self.objective} if isinstance(self.objective, str) else set(self.objective)
        return not names <= {"ce", "auto"}

    @property
    def step_tokens(self) -> int:
        """Tokens per step on one device, full sequences."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return int(batch * self.max_length)

    def trainer_config(
        self, output_dir: Path | str, *, seed: int, device: str, **changes: Any
    ) -> DraftDistillationConfig:
        """Return the trainer's config for ``device``, ``cpu`` or ``cuda``, with some ``changes``.

        Raises:
            FastDraftError: transformers or TRL refuse a value.
        """
        from fastdraft_hf.train.config import DraftDistillationConfig

        names = {field.name for field in dataclasses.fields(DraftDistillationConfig)}
        values = {name: getattr(self, name) for name in type(self).model_fields if name in names}
        values |= {"output_dir": str(output_dir), "seed": seed, "data_seed": seed}
        if device == "cpu":
            values |= {"use_cpu": True, "dataloader_pin_memory": False}
        try:
            return DraftDistillationConfig(**{**values, **changes})
        except FastDraftError:
            raise
        except (TypeError, ValueError) as error:
            raise FastDraftError(" ".join(str(error).split())) from error

    def peft_config(self) -> Any:
        """Return PEFT's config for `lora`, or ``None``."""
        if self.lora is None:
            return None
        from peft import LoraConfig

        return LoraConfig(**self.lora.model_dump(), task_type="CAUSAL_LM")


@cache
def training_section() -> Any:  # a type[TrainingSection] whose fields mypy cannot see
    """Return the section with every field of `DraftDistillationConfig` that a recipe may set.

    It is built when a training stage is read, so that other recipes do not import torch.
    """
    from typing import get_type_hints

    from fastdraft_hf.train.config import DraftDistillationConfig

    hints = get_type_hints(DraftDistillationConfig)
    fields: dict[str, Any] = {}
    for one in dataclasses.fields(DraftDistillationConfig):
        if one.name in _OURS or one.name in _NEVER or not one.init:
            continue
        default: dict[str, Any] = {"default": one.default}
        if one.default is dataclasses.MISSING:
            default = {"default_factory": one.default_factory}
        about = str(one.metadata.get("help", "")) or one.name
        kind = _annotation(hints[one.name])
        if one.name.endswith("_steps"):  # a number of steps, or a share
            kind = Count | kind
        fields[one.name] = (kind, Field(**default, description=about))
    budget = fields["max_train_tokens"][1].description
    fields["max_train_tokens"] = (Count, Field(1_000_000, description=budget))
    made = create_model("TrainingSection", __base__=TrainingSection, **fields)
    own = {*TrainingSection.model_fields, *DraftDistillationConfig.__annotations__}
    own |= {"per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay"}
    own |= {"lr_scheduler_kwargs", "max_grad_norm", "logging_steps"}
    made.SHOWN = frozenset(own)
    return made


def _annotation(kind: Any) -> Any:
    """Return a dataclass field's type as the recipe reads it: counts, strict booleans."""
    simple = {int: Count, float: Number, bool: StrictBool, dict: dict[Key, Any]}
    if kind in simple:
        return simple[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        # An enum stands beside str, which names its members.
        options = [
            one for one in args if not (isinstance(one, type) and issubclass(one, enum.Enum))
        ]
        return Union[tuple(_annotation(one) for one in options)]  # noqa: UP007
    if origin is dict:
        return dict[Key, _annotation(args[1])]  # type: ignore[misc]
    if origin is list:
        return list[_annotation(args[0])]  # type: ignore[misc]
    return kind if kind in (str, Any, type(None)) else Any


def _read(value: Any) -> Any:
    if value is None or isinstance(value, TrainingSection):
        return value
    return TypeAdapter(training_section()).validate_python(value)


TrainingField = Annotated[SerializeAsAny[TrainingSection], BeforeValidator(_read)]
"""Type of a recipe's training sections."""
