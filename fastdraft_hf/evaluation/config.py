"""What a recipe says about measuring."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fastdraft_hf._errors import FastDraftError, nearest
from fastdraft_hf._schema import setting
from fastdraft_hf.data.heldout import TASK_NAMES
from fastdraft_hf.export.openvino import WeightFormat


def _check_tasks(tasks: list[str]) -> None:
    for name in tasks:
        if name not in TASK_NAMES:
            known = ", ".join(TASK_NAMES)
            raise FastDraftError(f"tasks: no task set '{name}'{nearest(name, TASK_NAMES)}; {known}")
    if not tasks:
        raise FastDraftError("tasks: at least one is needed")


@dataclass
class EvaluateConfig:
    """Acceptance on held-out prompts, and that greedy output does not change."""

    tasks: list[str] = setting(list(TASK_NAMES), "held-out task sets")
    prompts_per_task: int = setting(16, "prompts of each, drawn by the recipe's seed")
    max_prompt_tokens: int = setting(400, "longer prompts are passed over when drawing")
    max_new_tokens: int = setting(64, "length of an answer")
    num_assistant_tokens: int = setting(3, "tokens drafted a round (γ); the paper uses 3")
    temperature: float = setting(0.6, "of the sampled runs; the paper uses 0.6")
    path: Literal["ours", "transformers"] = setting(
        "ours",
        "how the draft is used: our own loop, or stock assisted generation (slower; the greedy "
        "figures are the same)",
    )
    untrained_prompts_per_task: int = setting(
        4, "prompts on which the draft is also measured as it was before training"
    )

    def __post_init__(self) -> None:
        _check_tasks(self.tasks)
        for name in ("prompts_per_task", "max_new_tokens", "num_assistant_tokens"):
            if getattr(self, name) < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise FastDraftError("temperature: must be above 0; greedy runs are made beside it")


BenchPath = Literal[
    "transformers",
    "ours",
    "prompt-lookup",
    "openvino",
    "openvino-prompt-lookup",
    "ours-openvino",
]


@dataclass
class BenchConfig:
    """Wall clock with and without the draft, in turn, over γ."""

    tasks: list[str] = setting(list(TASK_NAMES), "held-out task sets")
    prompts_per_task: int = setting(4, "prompts of each")
    max_prompt_tokens: int = setting(400, "longer prompts are passed over when drawing")
    max_new_tokens: int = setting(64, "length of an answer")
    num_assistant_tokens: list[int] = setting([1, 2, 3, 4, 5], "values of γ to try")
    repeats: int = setting(2, "times every prompt is decoded in every setting")
    paths: list[BenchPath] = setting(
        ["transformers", "openvino"],
        "what is timed: transformers (stock), ours (our loop), prompt-lookup (stock, no draft), "
        "openvino (GenAI), openvino-prompt-lookup (GenAI), ours-openvino (our loop over "
        "OVModelForCausalLM); OpenVINO's are left out where it is not installed",
    )
    drafts: dict[str, str] = setting(
        {},
        "other drafts, name: folder or Hub id; each is timed on transformers and ours, if listed",
    )
    memory: bool = setting(True, "measure the peak memory of each path, in processes of their own")
    weight_format: WeightFormat = setting("int8", "OpenVINO weights of target and draft")
    write: bool = setting(
        False, "store the best γ in the generation config of the draft that was measured"
    )

    def __post_init__(self) -> None:
        _check_tasks(self.tasks)
        if not self.num_assistant_tokens or min(self.num_assistant_tokens) < 1:
            raise FastDraftError("num_assistant_tokens: a list of numbers of at least 1 is needed")
        for name in self.drafts:  # it becomes a part of labels and keys
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
                raise FastDraftError(
                    f"drafts: '{name}' is no name; letters, digits, '.', '_' and '-' are allowed"
                )
        if self.drafts and not {"transformers", "ours"} & set(self.paths):
            raise FastDraftError("drafts: they are timed on transformers and ours; list one")
        for name in ("prompts_per_task", "max_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {getattr(self, name)}")
