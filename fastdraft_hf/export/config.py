"""The recipe's section on export."""

from __future__ import annotations

from pydantic import Field

from fastdraft_hf._config import Count, Section
from fastdraft_hf.export.gguf import GGUFType
from fastdraft_hf.export.openvino import WeightFormat


class ExportConfig(Section):
    """The draft in other engines' formats."""

    openvino: list[WeightFormat] = Field(
        ["int8"],
        description="weight formats of the draft's OpenVINO folders; empty for none. Without the "
        "openvino extra they are left out with a warning",
    )
    gguf: list[GGUFType] = Field(
        [], description="weight types of the draft's GGUF files, for llama.cpp"
    )
    acceptance_texts: Count = Field(
        8,
        ge=0,
        le=8,
        description="texts of the target on which the acceptance of every export is measured, at "
        "most 8; 0 for none",
    )
