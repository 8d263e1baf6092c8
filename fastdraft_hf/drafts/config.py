"""What a recipe says about the draft's shape and its first weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._schema import setting

FirstWeights = Literal["scratch", "project", "slice"]


@dataclass
class DesignConfig:
    """The draft: the target's architecture, smaller, under a parameter budget."""

    draft: str | None = setting(
        None, "start from this draft (a folder) instead of designing one; the rest is then unused"
    )
    params: int = setting(10_000_000, "parameter budget of the draft, such as 10M")
    num_hidden_layers: int = setting(2, "layers; latency grows with them more than with width")
    hidden_size: int | None = setting(
        None, "width; by default the widest multiple of width_multiple that meets the budget"
    )
    intermediate_size: int | None = setting(
        None,
        "feed-forward width; by default the target's own with slice, else its ratio to the width",
    )
    width_multiple: int = setting(32, "the width is a multiple of this")
    first_weights: FirstWeights = setting(
        "slice",
        "scratch: random; project: embeddings and head by PCA of the target's, layers random; "
        "slice: that, and some of the target's own layers cut to the draft's width",
    )

    def __post_init__(self) -> None:
        for name in ("params", "num_hidden_layers", "width_multiple"):
            if getattr(self, name) < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {value}")
