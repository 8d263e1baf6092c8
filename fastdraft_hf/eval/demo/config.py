"""What a demonstration is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool

from fastdraft_hf._config import Count, Number, Section
from fastdraft_hf._errors import FastDraftError

EngineName = Literal["auto", "openvino", "transformers"]


class DemoConfig(Section):
    """Which models answer, how, and for how long."""

    target: str = Field(
        "embedded:smollm2-135m-instruct", description="model id, a folder, or the embedded target"
    )
    draft: str | None = Field(
        None,
        description=(
            "folder of a draft or of a run, or a model id; by default the repository's own draft"
        ),
    )
    engine: EngineName = Field(
        "auto",
        description=(
            "openvino: both models in int8; transformers: PyTorch, float32 on a CPU; auto: "
            "openvino where it is installed and there is no GPU"
        ),
    )
    num_assistant_tokens: Count | None = Field(
        None,
        description=(
            "tokens drafted a round (γ); by default what the draft's generation config says"
        ),
    )
    temperature: Number = Field(0.0, description="0 is greedy; above, plain sampling")
    max_new_tokens: Count = Field(128, description="longest answer")
    chat: StrictBool | None = Field(
        None,
        description=(
            "put prompts into the chat template, or give them as they are; by default instructions "
            "are put into it and code is not"
        ),
    )
    seed: Count = Field(0, description="of the sampling")

    def check_values(self) -> None:
        self.require_positive("max_new_tokens", "num_assistant_tokens")
        if not 0 <= self.temperature < float("inf"):
            raise FastDraftError(f"temperature: must be 0 or more, got {self.temperature}")
