"""What a recipe says about text: what the target writes, and what a training stage reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._schema import setting
from fastdraft_hf.data.engines import EngineName


@dataclass
class GeneratedSet:
    """One set of target-written texts."""

    kind: Literal["free", "magpie", "code"] = setting(
        "magpie",
        "free: text from the start of a document; magpie: the target writes the instruction, then "
        "answers it; code: it completes functions of the standard library",
    )
    rows: int = setting(256, "texts to write (magpie: instructions to write before filtering)")
    max_new_tokens: int = setting(256, "longest text, in tokens")
    max_instruction_tokens: int = setting(96, "magpie: longest instruction, in tokens")
    temperatures: list[float] = setting(
        [0.0, 0.6, 0.8, 1.0], "dealt out row by row; 0 is greedy (paper, section 3.3)"
    )
    max_minutes: float | None = setting(
        None,
        "stop starting new texts after this time and go on with what there is; for magpie it holds "
        "for the instructions and again for the answers",
    )

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise FastDraftError(f"rows: must be at least 1, got {self.rows}")
        if self.max_new_tokens < 1:
            raise FastDraftError(f"max_new_tokens: must be at least 1, got {self.max_new_tokens}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise FastDraftError("temperatures: a list of numbers of at least 0 is needed")


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
    top_k: int = setting(32, "tokens to keep; the rest's mass is kept as one number")
    temperature: float = setting(
        1.0, "of the distribution; align.distillation_temperature must be the same"
    )
    batch_tokens: int = setting(4096, "tokens read at once, padding included")
    rows_per_shard: int = setting(256, "rows a shard; a killed run repeats at most one")

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_tokens", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise FastDraftError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise FastDraftError(f"temperature: must be above 0, got {self.temperature}")
