"""What a recipe says about the draft's shape and its initialization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._schema import setting

# `slice` is what `prune` was called first; recipes and finished runs that say it stay valid.
Initialization = Literal["scratch", "project", "prune", "transplant", "slice"]


@dataclass
class DesignConfig:
    """The draft: the target's architecture, smaller, under a parameter budget."""

    draft: str | None = setting(
        None, "start from this draft (a folder) instead of designing one; the rest is then unused"
    )
    params: int = setting(10_000_000, "parameter budget of the draft, such as 10M; met within 2%")
    num_hidden_layers: int = setting(2, "layers; latency grows with them more than with width")
    hidden_size: int | None = setting(
        None, "width; by default what meets the budget nearest to the target's proportions"
    )
    intermediate_size: int | None = setting(
        None, "feed-forward width; by default it takes up what the width leaves of the budget"
    )
    width_multiple: int = setting(
        32, "the width is a multiple of this; halved where the budget cannot be met otherwise"
    )
    init: Initialization = setting(
        "prune",
        "scratch: random; project: embeddings and head by PCA of the target's, layers random; "
        "prune: that, and some of the layers cut to the draft's width; transplant: a donor with "
        "another tokenizer, its embeddings carried over token by token; slice: old name of prune",
    )
    donor: str | None = setting(
        None,
        "prune, transplant: the model whose weights are taken, an id or a folder; prune takes the "
        "target's by default, and any other must have its vocabulary",
    )
    layers: Literal["even", "first", "importance"] | list[int] = setting(
        "even",
        "prune, transplant: which layers are taken: evenly spaced, the first, the ones that change "
        "the hidden states most, or a list such as [0, 5]",
    )
    token_map: dict[str, str] = setting(
        {}, "transplant: the donor's token for a token of the target, over what is found by itself"
    )
    resize: bool = setting(
        False,
        "give a draft or donor whose vocabulary agrees with the target's as far as it goes the "
        "target's number of rows",
    )

    @property
    def method(self) -> str:
        """The initialization by their present name."""
        return "prune" if self.init == "slice" else self.init

    @property
    def takes_layers(self) -> bool:
        """Whether layers are cut from a model, so that the draft cannot be larger inside."""
        return self.method in ("prune", "transplant")

    def __post_init__(self) -> None:
        for name in ("params", "num_hidden_layers", "width_multiple"):
            if getattr(self, name) < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {value}")
        if self.draft is not None:
            return
        if self.method == "transplant" and self.donor is None:
            raise FastDraftError("donor: init transplant needs one (an id or a folder)")
        if self.donor is not None and not self.takes_layers:
            raise FastDraftError(f"donor: init {self.init} takes none")
        if isinstance(self.layers, list):
            if len(self.layers) != self.num_hidden_layers:
                raise FastDraftError(
                    f"layers: {len(self.layers)} are named and num_hidden_layers is "
                    f"{self.num_hidden_layers}"
                )
            if self.layers != sorted(set(self.layers)) or self.layers[0] < 0:
                raise FastDraftError(
                    f"layers: indices from 0, each once, rising; got {self.layers}"
                )
