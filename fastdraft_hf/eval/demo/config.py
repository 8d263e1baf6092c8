"""What a demonstration is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._schema import setting

EngineName = Literal["auto", "openvino", "transformers"]


@dataclass
class DemoConfig:
    """Which models answer, how, and for how long."""

    target: str = setting(
        "embedded:smollm2-135m-instruct", "model id, a folder, or the embedded target"
    )
    draft: str | None = setting(
        None, "folder of a draft or of a run, or a model id; by default the repository's own draft"
    )
    engine: EngineName = setting(
        "auto",
        "openvino: both models in int8; transformers: PyTorch, float32 on a CPU; auto: openvino "
        "where it is installed and there is no GPU",
    )
    num_assistant_tokens: int | None = setting(
        None, "tokens drafted a round (γ); by default what the draft's generation config says"
    )
    temperature: float = setting(0.0, "0 is greedy; above, plain sampling")
    max_new_tokens: int = setting(128, "longest answer")
    chat: bool | None = setting(
        None,
        "put prompts into the chat template, or give them as they are; by default instructions "
        "are put into it and code is not",
    )
    seed: int = setting(0, "of the sampling")

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_assistant_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {value}")
        if not 0 <= self.temperature < float("inf"):
            raise FastDraftError(f"temperature: must be 0 or more, got {self.temperature}")
