"""Settings of the search for the best draft on this machine."""

from typing import Annotated, Literal

from pydantic import Field

from fastdraft_hf._config import Key, Number, Positive, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.draft.config import Initialization

Measure = Literal["cpu", "cuda", "openvino"]
Share = Annotated[Number, Field(ge=0, le=1)]


class TuneConfig(Section):
    """Which drafts are timed, on what, and which acceptance their speed is predicted with."""

    params: Positive = Field(12_000_000, description="parameter budget of every draft, such as 12M")
    measure: Measure = Field(
        "cpu",
        description=(
            "cpu: PyTorch in float32; cuda: PyTorch in bfloat16; openvino: OVModelForCausalLM in "
            "int8 on the CPU; each in our own decoding loop"
        ),
    )
    depths: list[Positive] | None = Field(
        None, description="numbers of layers to try; by default 1, 2, 4, 8 and 12 where they fit"
    )
    widths_per_depth: Positive = Field(2, description="widths to try at each depth")
    init: Initialization = Field(
        "scratch",
        description=(
            "initialization of the trained draft: it limits the shapes, and probes start from it; "
            "timed drafts have random weights"
        ),
    )
    max_num_assistant_tokens: Positive = Field(5, description="largest γ")
    context: Positive = Field(256, description="tokens in the caches when timing starts")
    rounds: Positive = Field(5, description="rounds timed for each draft and γ in a repeat")
    repeats: Positive = Field(3, description="times that all drafts are timed, in random order")
    acceptance: dict[Key, Share] | Share = Field(
        0.4,
        description=(
            "chance that a drafted token is accepted: a number, or by depth, {2: 0.4, 4: 0.47}; "
            "with probe_tokens it is measured"
        ),
    )
    probe_tokens: Positive | None = Field(
        None, description="train every draft on this many tokens of rows and measure its acceptance"
    )
    rows: list[str] = Field([], description="probes: folders of generated sets")

    def check_values(self) -> None:
        if self.probe_tokens is not None and "acceptance" in self.model_fields_set:
            raise FastDraftError("acceptance: give it or probe_tokens, not both")
        if self.probe_tokens is not None and not self.rows:
            raise FastDraftError("rows: probes need folders of generated sets (generate/NAME)")
