"""The models that a benchmark times, loaded once for all settings of a runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.bench import OPENVINO, Decode, Setting
from fastdraft_hf.eval.prompts import EvaluationPrompt


@dataclass(frozen=True)
class Models:
    """The folders of the models.

    Attributes:
        target: the target's folder.
        drafts: folders of PyTorch drafts by name; the draft that is measured has the empty name.
        target_openvino: the target's OpenVINO folder, if a path reads it.
        drafts_openvino: OpenVINO folders of drafts, by name likewise.
        device: cpu or cuda, of the PyTorch paths; OpenVINO runs on the CPU.
        stop_ids: tokens that end an answer; empty for those of the target's generation config.
    """

    target: str
    drafts: dict[str, str] = field(default_factory=dict)
    target_openvino: str | None = None
    drafts_openvino: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    stop_ids: list[int] = field(default_factory=list)


def load_engine(models: Models, settings: Sequence[Setting]) -> Decode:
    """Load the models that the settings of one runtime need (baselines included), each once."""
    openvino = any(s.path in OPENVINO for s in settings)
    return (_OpenVINO if openvino else _PyTorch)(models, settings)


class _Engine:
    """A target and drafts that decode through ``generate``."""

    target: Any = None

    def __init__(self, models: Models) -> None:
        self._models = models

    def _set_target(self, target: Any) -> None:
        self.target, config = target, target.generation_config
        if self._models.stop_ids:
            config.eos_token_id = self._models.stop_ids
            if config.pad_token_id is None:
                config.pad_token_id = self._models.stop_ids[0]

    def _arguments(
        self, setting: Setting, prompt: EvaluationPrompt, max_new_tokens: int
    ) -> dict[str, Any]:
        return {
            "task": prompt.task,
            "key": prompt.key,
            "max_new_tokens": max_new_tokens,
            "num_assistant_tokens": setting.num_assistant_tokens,
        }


class _PyTorch(_Engine):
    def __init__(self, models: Models, settings: Sequence[Setting]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from fastdraft_hf.draft.reduced_vocabulary import load_draft, read_reduced_vocabulary

        super().__init__(models)
        # The usual type of each device: float32 has the fastest kernels of most CPUs.
        dtype = torch.bfloat16 if models.device == "cuda" else torch.float32

        def load(folder: str) -> Any:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            return model.to(models.device).eval()

        self._set_target(load(models.target))
        self._drafts: dict[tuple[str, str], Any] = {}
        for path, name in sorted(
            {(s.path, s.draft) for s in settings if s.path in ("transformers", "ours")}
        ):
            folder = models.drafts[name]
            if path == "ours":
                self._drafts[path, name] = load_draft(folder, dtype=dtype).to(models.device).eval()
                continue
            # Stock assisted generation reads the unreduced head, our loop the reduced one.
            ours = self._drafts.get(("ours", name))
            shared = ours is not None and read_reduced_vocabulary(folder) is None
            self._drafts[path, name] = ours if shared else load(folder)

    def __call__(
        self, setting: Setting, prompt: EvaluationPrompt, max_new_tokens: int
    ) -> DecodingRecord:
        from fastdraft_hf.decode.assisted import decode

        path: Any = "transformers" if setting.path == "alone" else setting.path
        draft = self._drafts.get((setting.path, setting.draft))
        arguments = self._arguments(setting, prompt, max_new_tokens)
        return decode(self.target, prompt.ids, draft=draft, path=path, **arguments)


class _OpenVINO(_Engine):
    """GenAI pipelines and ``OVModelForCausalLM``.

    A GenAI pipeline is made for one way of drafting and cannot decode without it, so there are as
    many pipelines with the target as there are ways, and optimum-intel's model beside them.
    Pipelines of one process share a model's weights if the plug-in maps them from the file.
    """

    def __init__(self, models: Models, settings: Sequence[Setting]) -> None:
        super().__init__(models)
        drafts, target = models.drafts_openvino, Path(models.target_openvino or "")
        self._pipelines: dict[str, Any] = {}
        self._drafts: dict[str, Any] = {}
        for one in settings:
            if one.path.startswith("openvino") and one.name not in self._pipelines:
                from fastdraft_hf.decode.openvino.pipeline import OpenVINODecoder

                self._pipelines[one.name] = OpenVINODecoder(
                    target,
                    Path(drafts[one.draft]) if one.path == "openvino" else None,
                    prompt_lookup=one.path == "openvino-prompt-lookup",
                )
        paths = {s.path for s in settings}
        if paths & {"ours-openvino", "ours-openvino-alone"}:
            from optimum.intel import OVModelForCausalLM

            from fastdraft_hf.decode.openvino.paged import paged

            # Without `export=False` optimum-intel asks the Hub about each folder.
            given = {"compile": False, "export": False}
            self._set_target(OVModelForCausalLM.from_pretrained(str(target), **given))
            # Paging drops the target's own compiled graph, once. Done here and not by the first
            # answer with a draft: the target alone would compile it again while it is timed.
            if "ours-openvino" in paths:
                paged(self.target)
            for name in sorted({s.draft for s in settings if s.path == "ours-openvino"}):
                # The loop compiles what it runs; nobody calls a draft by itself.
                self._drafts[name] = OVModelForCausalLM.from_pretrained(drafts[name], **given)

    def __call__(
        self, setting: Setting, prompt: EvaluationPrompt, max_new_tokens: int
    ) -> DecodingRecord:
        from fastdraft_hf.decode.assisted import decode

        arguments = self._arguments(setting, prompt, max_new_tokens)
        if setting.name in self._pipelines:
            stop_ids = set(self._models.stop_ids)
            record: DecodingRecord = self._pipelines[setting.name].decode(
                prompt.ids, stop_ids=stop_ids, **arguments
            )
            return record
        draft = self._drafts[setting.draft] if setting.path == "ours-openvino" else None
        record = decode(self.target, prompt.ids, draft=draft, path="ours", **arguments)
        record.path = "ours-openvino"
        return record
