"""What a recipe says about export."""

from __future__ import annotations

from dataclasses import dataclass

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._schema import setting
from fastdraft_hf.export.gguf import GGUFType
from fastdraft_hf.export.openvino import WeightFormat


@dataclass
class ExportConfig:
    """The draft in other engines' formats."""

    openvino: list[WeightFormat] = setting(
        ["int8"],
        "weight formats of the draft's OpenVINO folders; empty for none. Left out with a line in "
        "the log where the openvino extra is not installed",
    )
    gguf: list[GGUFType] = setting([], "weight types of the draft's GGUF files, for llama.cpp")
    check: bool = setting(
        True, "compare every export with PyTorch: logits and greedy text; fp32 must agree"
    )
    acceptance_texts: int = setting(
        8,
        "texts the target writes to read the draft's acceptance on, before and after; 0 for none",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance_texts <= 8:
            raise FastDraftError(f"acceptance_texts: from 0 to 8, got {self.acceptance_texts}")
