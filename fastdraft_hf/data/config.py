"""What a recipe says about text: what the target writes, and what a training stage reads."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import Field, StrictBool

from fastdraft_hf._config import Count, Key, Number, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import EngineName
from fastdraft_hf.data.filters import RowFilters

# A name of a set becomes a folder.
_FOLDER = re.compile(r"\w[\w.-]*")


class GeneratedSet(Section):
    """One set of target-written texts."""

    kind: Literal["free", "magpie", "code", "passages", "dataset"] = Field(
        "magpie",
        description=(
            "free: text from the start of a document; magpie: the target writes the instruction, "
            "then answers it; code: it completes functions of the standard library; passages: it "
            "does tasks about passages of the installed packages' documentation; dataset: it "
            "answers the prompts of a dataset"
        ),
    )
    rows: Count = Field(
        256,
        description=(
            "prompts to answer (magpie: instructions to write before filtering; free: texts)"
        ),
    )
    max_new_tokens: Count = Field(256, description="longest text, in tokens")
    max_prompt_tokens: Count = Field(
        1024,
        description=(
            "longest prompt, in tokens, template included; longer ones are left out and counted"
        ),
    )
    temperatures: list[Number] = Field(
        [0.0, 0.6, 0.8, 1.0],
        description="temperatures of the texts; 0 is greedy (paper, section 3.3)",
    )
    temperatures_per_prompt: Literal["one", "all"] = Field(
        "one", description="one: dealt out prompt by prompt; all: every prompt at every temperature"
    )
    samples: Count = Field(
        1, description="texts of one prompt at one temperature; greedy there is always one"
    )
    top_p: Number = Field(1.0, description="nucleus that texts are sampled from; 1 is everything")
    system_prompt: str | None = Field(
        None,
        description=(
            "magpie, code, passages, dataset: system turn of every chat that has none of its own"
        ),
    )
    system_prompt_in_answers: StrictBool = Field(
        True,
        description=(
            "magpie: whether the answers too are written under system_prompt; if not, it says "
            "what is asked about, and the answers are those of a chat without it"
        ),
    )
    dataset: str | None = Field(
        None,
        description=(
            "dataset: id of the Hub, or a local jsonl, json, parquet, csv or txt file or a folder"
        ),
    )
    name: str | None = Field(None, description="dataset: its configuration")
    split: str = Field("train", description="dataset: the split")
    column: str | None = Field(
        None,
        description=(
            "dataset: column of the prompt, texts or chats (role and content, or from and value); "
            "empty: messages, conversations, conversation, prompt, instruction, question or text"
        ),
    )
    context_columns: list[str] = Field(
        [],
        description=(
            "dataset: columns of text that are put after a prompt that is text (Alpaca: input)"
        ),
    )
    revision: str | None = Field(
        None, description="dataset: branch, tag or commit of one of the Hub"
    )
    max_instruction_tokens: Count = Field(96, description="magpie: longest instruction, in tokens")
    instruction_temperatures: list[Number] = Field(
        [0.7, 0.8, 0.9, 1.0],
        description="magpie: temperatures of the instructions, dealt out row by row",
    )
    instruction_top_p: Number = Field(
        0.95, description="magpie: nucleus that instructions are sampled from; 1 is everything"
    )
    filters: RowFilters = Field(
        default_factory=RowFilters, description="which rows training leaves out"
    )
    max_minutes: Number | None = Field(
        None,
        description=(
            "stop starting new texts after this time and go on with what there is; for magpie it "
            "holds for the instructions and again for the answers"
        ),
    )

    def check_values(self) -> None:
        self.require_positive("rows", "max_new_tokens", "max_prompt_tokens", "samples")
        self.require_positive("max_instruction_tokens")
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            raise FastDraftError("temperatures: a list of numbers of at least 0 is needed")
        if self.temperatures_per_prompt == "all" and len(set(self.temperatures)) < len(
            self.temperatures
        ):
            raise FastDraftError(
                "temperatures: one stands twice, and every prompt gets every temperature once; "
                "samples asks for several texts"
            )
        if not self.instruction_temperatures or not all(
            0 < t < math.inf for t in self.instruction_temperatures
        ):
            raise FastDraftError(
                "instruction_temperatures: a list of numbers above 0 is needed; greedy "
                "instructions would all be the same"
            )
        for name in ("top_p", "instruction_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise FastDraftError(
                    f"{name}: above 0 and at most 1 is needed, got {getattr(self, name)}"
                )
        if self.kind == "dataset" and not self.dataset:
            raise FastDraftError("dataset: needed for kind dataset; an id of the Hub, or a file")
        if self.kind != "dataset" and self.dataset:
            raise FastDraftError(f"dataset: only kind dataset reads one, and kind is {self.kind}")
        if not self.system_prompt_in_answers and (
            self.kind != "magpie" or self.system_prompt is None
        ):
            raise FastDraftError(
                "system_prompt_in_answers: false is for kind magpie with a system_prompt"
            )
        if self.kind == "free" and self.system_prompt is not None:
            raise FastDraftError("system_prompt: kind free writes no chats")


class GenerateConfig(Section):
    """The target writes text, kept as the token ids it emitted."""

    RUNTIME_ONLY = ("server", "server_model", "draft", "num_assistant_tokens")

    sets: dict[Key, GeneratedSet] = Field({}, description="name of a set, and what it holds")
    engine: EngineName = Field(
        "auto",
        description="vllm where a server is named, else openvino on a CPU, transformers on a GPU",
    )
    server: str | list[str] | None = Field(
        None, description="URL of a vLLM server, or several; a key comes from VLLM_API_KEY only"
    )
    server_model: str | None = Field(
        None, description="the target's name on the servers, where it is another"
    )
    draft: str | None = Field(
        None,
        description=(
            "folder of a trained draft; it drafts while the target writes, if that is faster"
        ),
    )
    num_assistant_tokens: Count = Field(3, description="tokens it drafts a round")
    batch_size: Count = Field(64, description="texts written at once")
    rows_per_shard: Count = Field(
        128, description="rows a parquet shard; a killed run loses at most the last"
    )
    openvino_weight_format: Literal["fp32", "fp16", "int8", "int4"] = Field(
        "int8", description="weights of the target while it writes through OpenVINO"
    )

    def check_values(self) -> None:
        self.require_positive("batch_size", "rows_per_shard", "num_assistant_tokens")
        folders: dict[str, str] = {}
        for name, wanted in self.sets.items():
            if not _FOLDER.fullmatch(name):
                raise FastDraftError(
                    f"sets: '{name}' is no name of a folder; letters, digits, '.', '_' and '-' are"
                )
            # Where magpie's instructions go, another set cannot.
            for folder in (name, f"{name}-instructions")[: 2 if wanted.kind == "magpie" else 1]:
                if folder in folders:
                    raise FastDraftError(
                        f"sets: '{folders[folder]}' and '{name}' both need the folder {folder}; "
                        "rename one"
                    )
                folders[folder] = name

    @property
    def servers(self) -> list[str]:
        """The URLs of ``server``, one or several or none."""
        if self.server is None:
            return []
        return [self.server] if isinstance(self.server, str) else self.server


class LogitsConfig(Section):
    """The target reads what it wrote, and its most probable tokens are stored with it."""

    sets: list[str] = Field(
        [], description="generated sets to read; by default those that align reads"
    )
    engine: Literal["auto", "openvino", "transformers"] = Field(
        "auto", description="openvino on a CPU where it is installed, else transformers"
    )
    top_k: Count = Field(32, description="tokens to keep; the rest's mass is kept as one number")
    temperature: Number = Field(
        1.0, description="of the distribution; align.temperature must be the same"
    )
    batch_tokens: Count = Field(4096, description="tokens read at once, padding included")
    rows_per_shard: Count = Field(256, description="rows a shard; a killed run repeats at most one")

    def check_values(self) -> None:
        self.require_positive("top_k", "batch_tokens", "rows_per_shard")
        if self.temperature <= 0:
            raise FastDraftError(f"temperature: must be above 0, got {self.temperature}")
