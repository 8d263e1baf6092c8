"""What a recipe says about the draft's shape and its initialization."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool

from fastdraft_hf._config import Count, Key, Section
from fastdraft_hf._errors import FastDraftError

# `slice` is what `prune` was called first; recipes and finished runs that say it stay valid.
Initialization = Literal["scratch", "project", "prune", "transplant", "slice"]


class DesignConfig(Section):
    """The draft: the target's architecture, smaller, under a parameter budget."""

    draft: str | None = Field(
        None,
        description=(
            "start from this draft (a folder) instead of designing one; the rest is then unused"
        ),
    )
    params: Count = Field(
        10_000_000, description="parameter budget of the draft, such as 10M; met within 2%"
    )
    num_hidden_layers: Count = Field(
        2, description="layers; latency grows with them more than with width"
    )
    hidden_size: Count | None = Field(
        None,
        description="width; by default what meets the budget nearest to the target's proportions",
    )
    intermediate_size: Count | None = Field(
        None,
        description=(
            "feed-forward width; by default it takes up what the width leaves of the budget"
        ),
    )
    width_multiple: Count = Field(
        32,
        description=(
            "the width is a multiple of this; halved where the budget cannot be met otherwise"
        ),
    )
    init: Initialization = Field(
        "prune",
        description=(
            "scratch: random; project: embeddings and head by PCA of the target's, layers random; "
            "prune: that, and some of the layers cut to the draft's width; transplant: a donor "
            "with another tokenizer, its embeddings carried over token by token; slice: old name "
            "of prune"
        ),
    )
    donor: str | None = Field(
        None,
        description=(
            "prune, transplant: the model whose weights are taken, an id or a folder; prune takes "
            "the target's by default, and any other must have its vocabulary"
        ),
    )
    layers: Literal["even", "first", "importance"] | list[Count] = Field(
        "even",
        description=(
            "prune, transplant: which layers are taken: evenly spaced, the first, the ones that "
            "change the hidden states most, or a list such as [0, 5]"
        ),
    )
    token_map: dict[Key, str] = Field(
        {},
        description=(
            "transplant: the donor's token for a token of the target, over what is found by itself"
        ),
    )
    resize: StrictBool = Field(
        False,
        description=(
            "give a draft or donor whose vocabulary agrees with the target's as far as it goes the "
            "target's number of rows"
        ),
    )

    @property
    def method(self) -> str:
        """The initialization by their present name."""
        return "prune" if self.init == "slice" else self.init

    @property
    def takes_layers(self) -> bool:
        """Whether layers are cut from a model, so that the draft cannot be larger inside."""
        return self.method in ("prune", "transplant")

    def check_values(self) -> None:
        self.require_positive("params", "num_hidden_layers", "width_multiple")
        self.require_positive("hidden_size", "intermediate_size")
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
