"""What a recipe says about text: what the target writes, and what a training stage reads."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._schema import setting
from fastdraft_hf.data.engines import EngineName
from fastdraft_hf.data.filters import RowFilters

# A name of a set becomes a folder.
_FOLDER = re.compile(r"\w[\w.-]*")


@dataclass
class GeneratedSet:
    """One set of target-written texts."""

    kind: Literal["free", "magpie", "code", "passages", "dataset"] = setting(
        "magpie",
        "free: text from the start of a document; magpie: the target writes the instruction, then "
        "answers it; code: it completes functions of the standard library; passages: it does tasks "
        "about passages of the installed packages' documentation; dataset: it answers the prompts "
        "of a dataset",
    )
    rows: int = setting(
        256, "prompts to answer (magpie: instructions to write before filtering; free: texts)"
    )
    max_new_tokens: int = setting(256, "longest text, in tokens")
    max_prompt_tokens: int = setting(
        1024, "longest prompt, in tokens, template included; longer ones are left out and counted"
    )
    temperatures: list[float] = setting(
        [0.0, 0.6, 0.8, 1.0], "temperatures of the texts; 0 is greedy (paper, section 3.3)"
    )
    temperatures_per_prompt: Literal["one", "all"] = setting(
        "one", "one: dealt out prompt by prompt; all: every prompt at every temperature"
    )
    samples: int = setting(1, "texts of one prompt at one temperature; greedy there is always one")
    top_p: float = setting(1.0, "nucleus that texts are sampled from; 1 is everything")
    system_prompt: str | None = setting(
        None, "magpie, code, passages, dataset: system turn of every chat that has none of its own"
    )
    system_prompt_in_answers: bool = setting(
        True,
        "magpie: whether the answers too are written under system_prompt; if not, it says what "
        "is asked about, and the answers are those of a chat without it",
    )
    dataset: str | None = setting(
        None,
        "dataset: id of the Hub, or a local jsonl, json, parquet, csv or txt file or a folder",
    )
    name: str | None = setting(None, "dataset: its configuration")
    split: str = setting("train", "dataset: the split")
    column: str | None = setting(
        None,
        "dataset: column of the prompt, texts or chats (role and content, or from and value); "
        "empty: messages, conversations, conversation, prompt, instruction, question or text",
    )
    context_columns: list[str] = setting(
        [], "dataset: columns of text that are put after a prompt that is text (Alpaca: input)"
    )
    revision: str | None = setting(None, "dataset: branch, tag or commit of one of the Hub")
    max_instruction_tokens: int = setting(96, "magpie: longest instruction, in tokens")
    instruction_temperatures: list[float] = setting(
        [0.7, 0.8, 0.9, 1.0], "magpie: temperatures of the instructions, dealt out row by row"
    )
    instruction_top_p: float = setting(
        0.95, "magpie: nucleus that instructions are sampled from; 1 is everything"
    )
    filters: RowFilters = setting(RowFilters, "which rows training leaves out")
    max_minutes: float | None = setting(
        None,
        "stop starting new texts after this time and go on with what there is; for magpie it holds "
        "for the instructions and again for the answers",
    )

    def __post_init__(self) -> None:
        for name in ("rows", "max_new_tokens", "max_prompt_tokens", "samples"):
            if getattr(self, name) < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.max_instruction_tokens < 1:
            raise FastDraftError(
                f"max_instruction_tokens: must be at least 1, got {self.max_instruction_tokens}"
            )
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


@dataclass
class GenerateConfig:
    """The target writes text, kept as the token ids it emitted."""

    sets: dict[str, GeneratedSet] = setting({}, "name of a set, and what it holds")
    engine: EngineName = setting(
        "auto", "vllm where a server is named, else openvino on a CPU, transformers on a GPU"
    )
    server: str | list[str] | None = setting(
        None,
        "URL of a vLLM server, or several; a key comes from VLLM_API_KEY only",
        output=False,
    )
    server_model: str | None = setting(
        None, "the target's name on the servers, where it is another", output=False
    )
    draft: str | None = setting(
        None,
        "folder of a trained draft; it drafts while the target writes, if that is faster",
        output=False,
    )
    num_assistant_tokens: int = setting(3, "tokens it drafts a round", output=False)
    batch_size: int = setting(64, "texts written at once")
    rows_per_shard: int = setting(128, "rows a parquet shard; a killed run loses at most the last")
    openvino_weight_format: Literal["fp32", "fp16", "int8", "int4"] = setting(
        "int8", "weights of the target while it writes through OpenVINO"
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "rows_per_shard", "num_assistant_tokens"):
            if getattr(self, name) < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {getattr(self, name)}")
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


@dataclass
class LogitsConfig:
    """The target reads what it wrote, and its most probable tokens are stored with it."""

    sets: list[str] = setting([], "generated sets to read; by default those that align reads")
    engine: Literal["auto", "openvino", "transformers"] = setting(
        "auto", "openvino on a CPU where it is installed, else transformers"
    )
    top_k: int = setting(32, "tokens to keep; the rest's mass is kept as one number")
    temperature: float = setting(1.0, "of the distribution; align.temperature must be the same")
    batch_tokens: int = setting(4096, "tokens read at once, padding included")
    rows_per_shard: int = setting(256, "rows a shard; a killed run repeats at most one")

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_tokens", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise FastDraftError(f"temperature: must be above 0, got {self.temperature}")
