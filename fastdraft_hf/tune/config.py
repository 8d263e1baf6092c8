"""What a search for the best draft on this machine is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastdraft_hf._config import Count, Key, Number, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import Initialization
from fastdraft_hf.export.openvino import WeightFormat

Measure = Literal["cpu", "cuda", "openvino"]


class ReducedVocabularyConfig(Section):
    """A second draft beside the whole one, whose head scores the most frequent tokens only."""

    draft_vocab_size: Count = Field(
        8192, description="tokens that the head scores, such as 8192 or 16k"
    )
    sets: list[str] = Field(
        [],
        description=(
            "generated sets whose tokens are counted; by default those that align reads, or all "
            "without it"
        ),
    )
    texts: Count = Field(
        24, description="held-out texts to measure the cost in acceptance on; 0 leaves that out"
    )

    def check_values(self) -> None:
        if self.draft_vocab_size < 1:
            raise FastDraftError(
                f"draft_vocab_size: must be at least 1, got {self.draft_vocab_size}"
            )
        if self.texts < 0:
            raise FastDraftError(f"texts: must be at least 0, got {self.texts}")


class TuneConfig(Section):
    """Which drafts are timed on what, and with which acceptance speed is predicted."""

    params: Count = Field(
        12_000_000, description="parameter budget that every draft fills, such as 12M"
    )
    measure: Measure = Field(
        "cpu",
        description=(
            "cpu: PyTorch in float32; cuda: PyTorch in bfloat16; openvino: OVModelForCausalLM on "
            "the CPU; each through our own decoding loop"
        ),
    )
    weight_format: WeightFormat = Field(
        "int8", description="openvino: weights of target and drafts"
    )
    depths: list[Count] | None = Field(
        None,
        description=(
            "layers to try; by default 1, 2, 4, 8 and 12 as far as the budget and target go"
        ),
    )
    widths_per_depth: Count = Field(
        2, description="widths to try at each depth, from the widest that fits"
    )
    width_multiple: Count = Field(16, description="widths are multiples of this")
    init: Initialization = Field(
        "scratch",
        description=(
            "of the draft that will be trained: it decides the shapes there can be, and where "
            "probes start; what is timed has random weights"
        ),
    )
    draft_vocab_size: Count | None = Field(
        None,
        description=(
            "time drafts whose head scores this many tokens (see reduced vocabulary); all if empty"
        ),
    )
    max_num_assistant_tokens: Count = Field(5, description="largest γ")
    context: Count = Field(256, description="tokens in the caches when timing begins")
    rounds: Count = Field(3, description="rounds timed for every draft and γ in a repeat")
    repeats: Count = Field(3, description="times all drafts are timed, in turn")
    acceptance: dict[Key, Number] | list[Number] | Number | None = Field(
        None,
        description=(
            "chance that a drafted token is accepted: one number, or a list (the first decides), "
            "or by design or depth, {2: 0.4, 4x192: 0.47}; not needed with probe_tokens, else 0.4"
        ),
    )
    probe_tokens: Count | None = Field(
        None, description="train every draft on this many tokens of rows and measure its acceptance"
    )
    rows: list[str] = Field([], description="for probes: folders of sets that the target wrote")
    probe_texts: Count = Field(
        24, description="held-out texts that a probe's acceptance is measured on"
    )
    threads: Count | None = Field(
        None, description="cpu: threads of PyTorch; by default its own choice"
    )
    seed: Count = Field(0, description="of weights, prompt and probes")

    def check_values(self) -> None:
        self.require_positive(
            "params",
            "widths_per_depth",
            "width_multiple",
            "max_num_assistant_tokens",
            "rounds",
            "repeats",
            "context",
            "probe_texts",
        )
        self.require_positive("draft_vocab_size", "probe_tokens", "threads")
        if self.depths is not None and (not self.depths or min(self.depths) < 1):
            raise FastDraftError("depths: a list of numbers of at least 1 is needed")
        if self.depths is not None and len(set(self.depths)) < len(self.depths):
            raise FastDraftError(f"depths: one stands twice in {self.depths}")
        for value in self.acceptances:
            if not 0 <= value <= 1:
                raise FastDraftError(f"acceptance: a share from 0 to 1, got {value}")
        if isinstance(self.acceptance, (list, dict)) and not self.acceptance:
            raise FastDraftError("acceptance: at least one number is needed")
        if self.probe_tokens is not None and self.acceptance is not None:
            raise FastDraftError("acceptance: give it or probe_tokens, not both")
        if self.probe_tokens is not None and not self.rows:
            raise FastDraftError("rows: probes need folders of text that the target wrote")

    @property
    def acceptances(self) -> list[float]:
        """Every acceptance that was given; of one number or a list, in order."""
        given = self.acceptance
        if given is None:
            return []
        if isinstance(given, dict):
            return list(given.values())
        return list(given) if isinstance(given, list) else [given]
