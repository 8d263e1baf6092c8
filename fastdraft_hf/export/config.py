"""What a recipe says about export."""

from __future__ import annotations

from pydantic import Field, StrictBool

from fastdraft_hf._config import Count, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.export.gguf import GGUFType
from fastdraft_hf.export.openvino import WeightFormat


class ExportConfig(Section):
    """The draft in other engines' formats."""

    openvino: list[WeightFormat] = Field(
        ["int8"],
        description=(
            "weight formats of the draft's OpenVINO folders; empty for none. Left out with a line "
            "in the log where the openvino extra is not installed"
        ),
    )
    gguf: list[GGUFType] = Field(
        [], description="weight types of the draft's GGUF files, for llama.cpp"
    )
    check: StrictBool = Field(
        True,
        description="compare every export with PyTorch: logits and greedy text; fp32 must agree",
    )
    acceptance_texts: Count = Field(
        8,
        description=(
            "texts the target writes to read the draft's acceptance on, before and after; 0 for "
            "none"
        ),
    )

    def check_values(self) -> None:
        if not 0 <= self.acceptance_texts <= 8:
            raise FastDraftError(f"acceptance_texts: from 0 to 8, got {self.acceptance_texts}")
