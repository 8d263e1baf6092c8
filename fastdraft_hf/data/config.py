"""Settings of the sections ``generate`` and ``logits``."""

import re
from typing import Annotated, Literal

from pydantic import Field, StrictBool

from fastdraft_hf._config import Key, Number, Positive, Section, WithoutEmpty
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import EngineName

# A name of a set becomes a folder.
_FOLDER = re.compile(r"\w[\w.-]*")


class GeneratedSet(Section):
    """One set of generated rows."""

    kind: Literal["free", "magpie", "code", "passages", "dataset", "traffic"] = Field(
        "magpie",
        description=(
            "free: text from the start of a document; magpie: instructions that the target "
            "generates; code: functions of the standard library; passages: tasks about "
            "documentation; dataset: prompts of a dataset; traffic: what it answered in a log"
        ),
    )
    rows: Positive = Field(256, description="prompts to answer; of magpie, before filtering")
    max_new_tokens: Positive = Field(256, description="length limit of a completion, in tokens")
    max_prompt_tokens: Positive = Field(1024, description="longer prompts are left out")
    temperatures: list[Annotated[Number, Field(ge=0)]] = Field(
        [0.0, 0.6, 0.8, 1.0], min_length=1, description="0 is greedy"
    )
    temperatures_per_prompt: Literal["one", "all"] = Field(
        "one",
        description=(
            "one: one per prompt, in turn; all: every prompt at every one (one listed twice gives "
            "two completions)"
        ),
    )
    top_p: Number = Field(
        1.0, gt=0, le=1, description="nucleus to sample from; 1 is the whole distribution"
    )
    system_prompt: str | None = Field(None, description="system turn of chats without one")
    system_prompt_in_answers: StrictBool = Field(
        True, description="magpie: false leaves the system_prompt out of the answers"
    )
    dataset: str | None = Field(
        None,
        description=(
            "dataset: id on the Hub, or a jsonl, json, parquet, csv or txt file; traffic: a file, "
            "folder or glob of JSON Lines with requests and responses of OpenAI's API"
        ),
    )
    model: str | None = Field(
        None, description="traffic: only what this model answered, by its name in the log"
    )
    drop_patterns: list[str] = Field(
        [],
        description=(
            "traffic: regular expressions; an exchange with a match is left out, as is one with "
            "what looks like a password or key"
        ),
    )
    name: str | None = Field(None, description="dataset: its configuration")
    split: str = Field("train", description="dataset: the split")
    column: str | None = Field(
        None, description="dataset: column of texts or chats; by default found by its name"
    )
    context_columns: list[str] = Field(
        [], description="dataset: text columns to append to the prompt (Alpaca: input)"
    )
    revision: str | None = Field(None, description="dataset: branch, tag or commit on the Hub")
    max_instruction_tokens: Positive | None = Field(
        None,
        description="magpie: length limit of an instruction; by default what the first ones need",
    )
    instruction_temperatures: list[Annotated[Number, Field(gt=0)]] = Field(  # greedy: all equal
        [0.7, 0.8, 0.9, 1.0],
        min_length=1,
        description="magpie: temperatures of the instructions, in turn",
    )
    near_duplicates: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        0.8,
        description=(
            "similarity from which training leaves out a later row (Jaccard index of runs of five "
            "tokens, prompt and completion together); empty: near duplicates are kept"
        ),
    )
    max_minutes: Annotated[Number, Field(gt=0)] | None = Field(
        None,
        description=(
            "stop after this time; magpie: two fifths of it go to the instructions, and if it is "
            "not over when all are answered they are answered again, up to rows in all"
        ),
    )

    def check_values(self) -> None:
        reads = self.kind in ("dataset", "traffic")
        if reads and not self.dataset:
            raise FastDraftError(f"dataset: kind {self.kind} needs an id on the Hub or a file")
        if not reads and self.dataset:
            raise FastDraftError(
                f"dataset: only for kinds dataset and traffic, and kind is {self.kind}"
            )
        for key in ("model", "drop_patterns"):
            if getattr(self, key) and self.kind != "traffic":
                raise FastDraftError(f"{key}: only for kind traffic, and kind is {self.kind}")
        for pattern in self.drop_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise FastDraftError(
                    f"drop_patterns: '{pattern}' is no pattern ({error})"
                ) from None
        if not self.system_prompt_in_answers and (
            self.kind != "magpie" or self.system_prompt is None
        ):
            raise FastDraftError(
                "system_prompt_in_answers: false needs kind magpie and a system_prompt"
            )
        if self.kind == "free" and self.system_prompt is not None:
            raise FastDraftError("system_prompt: kind free has no chats")


class GenerateConfig(Section):
    """The target generates rows, kept as token ids."""

    RUNTIME_ONLY = ("server", "server_model")

    sets: Annotated[dict[Key, GeneratedSet], WithoutEmpty] = Field(
        {}, description="the sets, by name; null leaves one out"
    )
    engine: EngineName = Field(
        "auto",
        description="auto: openvino on a CPU, vllm on a GPU if it is installed, else transformers",
    )
    server: str | None = Field(
        None, description="URL of an OpenAI-compatible server to use; the key: VLLM_API_KEY"
    )
    server_model: str | None = Field(None, description="the target's name on the server")
    batch_size: Positive = Field(64, description="completions at once, per process")

    @property
    def readable(self) -> list[str]:
        """Names that later stages can read: the sets, and Magpie's instructions inside theirs."""
        magpie = [name for name, one in self.sets.items() if one.kind == "magpie"]
        return [*self.sets, *(f"{name}/instructions" for name in magpie)]

    def check_values(self) -> None:
        if self.server:
            from fastdraft_hf.data.engines.server import server_url

            server_url(self.server, "server")
        if self.server and self.engine != "auto":
            raise FastDraftError(
                f"server: engine {self.engine} does not use a server; set generate.engine to auto"
            )
        for name in self.sets:
            if not _FOLDER.fullmatch(name):
                raise FastDraftError(
                    f"sets: '{name}' cannot be a folder name; use letters, digits, '.', '_' and '-'"
                )


class LogitsConfig(Section):
    """The target's distribution over the generated rows is stored."""

    sets: list[str] = Field([], description="generated sets to read; by default those of align")
    engine: Literal["auto", "openvino", "transformers", "server"] = Field(
        "auto",
        description="auto: openvino on a CPU if it is installed, else transformers; "
        "server: the vLLM of generate.server",
    )
    top_k: Positive = Field(32, description="tokens to store; the tail's mass is one number")
    temperature: Number = Field(
        1.0, gt=0, description="of the distribution; align.temperature must be equal"
    )

    def check_values(self) -> None:
        if self.engine == "server" and self.temperature != 1:
            raise FastDraftError(
                "temperature: a server returns the most probable tokens at temperature 1, and "
                f"{self.temperature:g} needs them all"
            )
