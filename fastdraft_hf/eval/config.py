"""What a recipe says about measuring."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, StrictBool

from fastdraft_hf._config import Count, Key, Number, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.heldout import TASK_NAMES
from fastdraft_hf.data.task_sets import KNOWN, TaskSet, check_tasks
from fastdraft_hf.export.openvino import WeightFormat

_TASKS_HELP = (
    f"held-out task sets: a list of {', '.join(KNOWN)}; or a mapping of names to settings "
    "(dataset, name, split, column, instruction, words, key_column, revision, rows) for any data "
    "set of the Hub or local file"
)


class EvaluateConfig(Section):
    """Acceptance on held-out prompts, and that greedy output does not change."""

    tasks: dict[Key, TaskSet] | list[str] = Field(list(TASK_NAMES), description=_TASKS_HELP)
    prompts_per_task: Count = Field(16, description="prompts of each, drawn by the recipe's seed")
    max_prompt_tokens: Count = Field(400, description="longer prompts are passed over when drawing")
    max_new_tokens: Count = Field(64, description="length of an answer")
    num_assistant_tokens: list[Count] | Count = Field(
        3, description="tokens drafted a round (γ), one number or several; the paper uses 3"
    )
    temperature: list[Number] | Number = Field(
        0.6,
        description=(
            "of the sampled runs, one number or several; 0 adds greedy runs at every γ beside "
            "those at the first, which are always made; the paper uses 0.6"
        ),
    )
    path: Literal["ours", "transformers"] = Field(
        "ours",
        description=(
            "how the draft is used: our own loop, or stock assisted generation (slower; the greedy "
            "figures are the same)"
        ),
    )
    untrained_prompts_per_task: Count = Field(
        4, description="prompts on which the draft is also measured as it was before training"
    )

    def check_values(self) -> None:
        check_tasks(self.tasks)
        self.require_positive("prompts_per_task", "max_new_tokens")
        if self.untrained_prompts_per_task < 0:
            raise FastDraftError("untrained_prompts_per_task: must be at least 0")
        _check_numbers("num_assistant_tokens", self.gammas)
        if min(self.gammas) < 1:
            raise FastDraftError(f"num_assistant_tokens: must be at least 1, got {self.gammas}")
        _check_numbers("temperature", self.temperatures)
        if not all(0 <= t < float("inf") for t in self.temperatures):
            raise FastDraftError(f"temperature: must be at least 0, got {self.temperatures}")
        if not any(self.temperatures):
            raise FastDraftError(
                "temperature: must be above 0, or one of several must; greedy runs are made beside"
            )

    @property
    def gammas(self) -> list[int]:
        """Every γ; the first is the one that single figures are of."""
        value = self.num_assistant_tokens
        return list(value) if isinstance(value, list) else [value]

    @property
    def temperatures(self) -> list[float]:
        """Every temperature as given, 0 included."""
        value = self.temperature
        return list(value) if isinstance(value, list) else [value]

    @property
    def sampled(self) -> list[float]:
        """The temperatures above 0; the first is the one that single figures are of."""
        return [t for t in self.temperatures if t > 0]

    @property
    def greedy_gammas(self) -> list[int]:
        """The γ of greedy runs: the first, or all where temperature 0 is asked for."""
        return self.gammas if 0 in self.temperatures else self.gammas[:1]


def _check_numbers(name: str, values: list[int] | list[float]) -> None:
    if not values:
        raise FastDraftError(f"{name}: at least one is needed")
    if len(set(values)) < len(values):
        raise FastDraftError(f"{name}: one stands twice in {values}")


BenchPath = Literal[
    "transformers",
    "ours",
    "prompt-lookup",
    "openvino",
    "openvino-prompt-lookup",
    "ours-openvino",
]


class BenchConfig(Section):
    """Wall clock with and without the draft, in turn, over γ."""

    tasks: dict[Key, TaskSet] | list[str] = Field(list(TASK_NAMES), description=_TASKS_HELP)
    prompts_per_task: Count = Field(4, description="prompts of each")
    max_prompt_tokens: Count = Field(400, description="longer prompts are passed over when drawing")
    max_new_tokens: Count = Field(64, description="length of an answer")
    num_assistant_tokens: list[Count] = Field([1, 2, 3, 4, 5], description="values of γ to try")
    repeats: Count = Field(2, description="times every prompt is decoded in every setting")
    paths: list[BenchPath] = Field(
        ["transformers", "openvino"],
        description=(
            "what is timed: transformers (stock), ours (our loop), prompt-lookup (stock, no "
            "draft), openvino (GenAI), openvino-prompt-lookup (GenAI), ours-openvino (our loop "
            "over OVModelForCausalLM); OpenVINO's are left out where it is not installed"
        ),
    )
    drafts: dict[Key, str] = Field(
        {},
        description=(
            "other drafts, name: folder or Hub id; each is timed on transformers and ours, if "
            "listed"
        ),
    )
    memory: StrictBool = Field(
        True, description="measure the peak memory of each path, in processes of their own"
    )
    weight_format: WeightFormat = Field("int8", description="OpenVINO weights of target and draft")
    write: StrictBool = Field(
        False,
        description="store the best γ in the generation config of the draft that was measured",
    )

    def check_values(self) -> None:
        check_tasks(self.tasks)
        if not self.num_assistant_tokens or min(self.num_assistant_tokens) < 1:
            raise FastDraftError("num_assistant_tokens: a list of numbers of at least 1 is needed")
        for name in self.drafts:  # it becomes a part of labels and keys
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
                raise FastDraftError(
                    f"drafts: '{name}' is no name; letters, digits, '.', '_' and '-' are allowed"
                )
        if self.drafts and not {"transformers", "ours"} & set(self.paths):
            raise FastDraftError("drafts: they are timed on transformers and ours; list one")
        self.require_positive("prompts_per_task", "max_new_tokens", "repeats")
