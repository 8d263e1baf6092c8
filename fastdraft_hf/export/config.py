"""What a recipe says about export."""

from __future__ import annotations

from dataclasses import dataclass

from fastdraft_hf._schema import setting
from fastdraft_hf.export.openvino import WeightFormat


@dataclass
class ExportConfig:
    """The draft in other engines' formats."""

    openvino: list[WeightFormat] = setting(
        ["int8"],
        "weight formats of the draft's OpenVINO folders; empty for none. Left out with a line in "
        "the log where the openvino extra is not installed",
    )
