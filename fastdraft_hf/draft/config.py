"""The recipe's sections on the draft: shape and initialization, and a reduced vocabulary."""

from typing import Literal

from pydantic import Field, StrictBool

from fastdraft_hf._config import Count, Positive, Section
from fastdraft_hf._errors import FastDraftError

Initialization = Literal["auto", "scratch", "project", "prune", "transplant"]


class DesignConfig(Section):
    """The draft: the target's architecture, smaller, within a parameter budget."""

    draft: str | None = Field(
        None, description="use this draft (a folder); of the other settings only resize applies"
    )
    params: Positive | None = Field(
        None,
        description="parameter budget, such as 10M; by default a share of what the target reads "
        "per token: 13.5M for one of 135M, 156M for one of 8B",
    )
    num_hidden_layers: Positive | None = Field(
        None,
        description="layers: by default 2, or 4 where those read hardly more, as with a large "
        "vocabulary; on a GPU latency grows with them more than with width",
    )
    hidden_size: Positive | None = Field(None, description="width; by default what fits params")
    intermediate_size: Positive | None = Field(
        None, description="feed-forward width; by default what fills params"
    )
    init: Initialization = Field(
        "auto",
        description="auto: prune, and project where layers cannot be cut; scratch: random weights; "
        "project: the target's embeddings and head by PCA, random layers; prune: that, and layers "
        "of the target cut to the draft's widths; transplant: a donor with another tokenizer, its "
        "embeddings mapped token by token",
    )
    donor: str | None = Field(
        None,
        description="prune, transplant: the model (id or folder) whose weights are used; for "
        "prune, the target by default, and any other must have its vocabulary",
    )
    layers: Literal["even", "first"] | list[Count] = Field(
        "even",
        description="prune, transplant: which layers are kept: evenly spaced, the first, or a list "
        "such as [0, 5]",
    )
    resize: StrictBool = Field(
        False,
        description="give a draft or donor whose shared ids agree the target's number of rows",
    )

    @property
    def takes_layers(self) -> bool:
        """Whether layers are cut from a model, so that the draft cannot be larger inside."""
        return self.init in ("auto", "prune", "transplant")

    def check_values(self) -> None:
        if self.draft is not None:
            return
        if self.init == "transplant" and self.donor is None:
            raise FastDraftError("donor: init transplant needs one (a model id or a folder)")
        if self.donor is not None and not self.takes_layers:
            raise FastDraftError(
                f"donor: init {self.init} uses none; remove it, or use prune or transplant"
            )
        given, number = self.layers, self.num_hidden_layers
        if not isinstance(given, list):
            return
        if number is not None and len(given) != number:
            raise FastDraftError(
                f"layers: {len(given)} are listed, but num_hidden_layers is {number}"
            )
        if not given or given != sorted(set(given)) or given[0] < 0:
            raise FastDraftError(
                f"layers: must be ascending indices from 0 without repeats, got {given}"
            )


class ReducedVocabularyConfig(Section):
    """The trained draft's head scores the most frequent tokens only."""

    draft_vocab_size: Positive | None = Field(
        None,
        description="tokens the head scores, such as 16k; by default as many as make drafting "
        "fastest, by the draft's right guesses and the bytes it reads",
    )
    sets: list[str] = Field(
        [],
        description=(
            "generated sets whose tokens are counted; by default those that align reads, or all "
            "without align"
        ),
    )
