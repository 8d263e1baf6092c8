"""The models a benchmark times, loaded once and shared by every setting of a runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.bench import RUNTIMES, Decode, Setting
from fastdraft_hf.eval.prompts import EvaluationPrompt

if TYPE_CHECKING:
    from fastdraft_hf.decode.assisted import DraftPath


@dataclass(frozen=True)
class Models:
    """Where the models lie, in plain values: a process of its own can be told the same.

    Attributes:
        target: the target's folder.
        drafts: folders of PyTorch drafts by name; the run's own has the empty name.
        target_openvino: the target's OpenVINO folder, where a path reads it.
        drafts_openvino: OpenVINO folders of drafts, by name likewise.
        device: cpu or cuda, of the PyTorch paths; OpenVINO's run on the CPU.
        stop_ids: tokens that end an answer through GenAI.
        seed: unused by greedy decoding, but part of every call.
    """

    target: str
    drafts: dict[str, str] = field(default_factory=dict)
    target_openvino: str | None = None
    drafts_openvino: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    stop_ids: list[int] = field(default_factory=list)
    seed: int = 0


def load_engine(models: Models, settings: Sequence[Setting]) -> Decode:
    """Load what the settings of one runtime need, each model once, and return what decodes.

    Args:
        models: where they lie.
        settings: of one runtime; baselines included where they are timed.
    """
    pytorch = RUNTIMES["pytorch"]
    if all(s.path in (*pytorch, "alone") for s in settings):
        return _PyTorch(models, settings).decode
    return _OpenVINO(models, settings).decode


class _PyTorch:
    """One target, and the drafts that are read."""

    def __init__(self, models: Models, settings: Sequence[Setting]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from fastdraft_hf.draft.reduced_vocabulary import load_draft, read_reduced_vocabulary

        # What a user of either device runs: float32 has the fastest kernels of most CPUs.
        dtype = torch.bfloat16 if models.device == "cuda" else torch.float32

        def load(folder: str) -> Any:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
            return model.to(models.device).eval()

        self._seed = models.seed
        self._target = load(models.target)
        wanted = sorted({(s.path, s.draft) for s in settings if s.path in ("transformers", "ours")})
        self._drafts: dict[tuple[str, str], Any] = {}
        for path, name in wanted:
            folder = models.drafts[name]
            # A reduced vocabulary is our loop's; stock assisted generation reads the whole one.
            other = self._drafts.get(("ours", name))
            if path == "ours":
                draft = load_draft(folder, dtype=dtype).to(models.device).eval()
            else:
                shared = other is not None and read_reduced_vocabulary(folder) is None
                draft = other if shared else load(folder)
            self._drafts[path, name] = draft

    def decode(
        self, setting: Setting, prompt: EvaluationPrompt, max_new_tokens: int
    ) -> DecodingRecord:
        from fastdraft_hf.decode.assisted import decode

        path: DraftPath = "transformers"
        if setting.path in ("ours", "prompt-lookup"):
            path = setting.path  # type: ignore[assignment]
        drafted = setting.path in ("transformers", "ours")
        return decode(
            self._target,
            prompt.ids,
            task=prompt.task,
            key=prompt.key,
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            seed=self._seed,
            draft=self._drafts[setting.path, setting.draft] if drafted else None,
            num_assistant_tokens=setting.num_assistant_tokens,
            path=path,
        )


class _OpenVINO:
    """GenAI pipelines and ``OVModelForCausalLM``.

    A GenAI pipeline is made for one way of drafting and cannot decode without it, so the target
    is given to as many pipelines as there are ways, and once more to optimum-intel. Pipelines of
    one process share a model's weights where the plug-in maps them from the file.
    """

    def __init__(self, models: Models, settings: Sequence[Setting]) -> None:
        paths = {s.path for s in settings}
        drafts = models.drafts_openvino
        self._seed, self._stop_ids = models.seed, set(models.stop_ids)
        self._pipelines: dict[str, Any] = {}
        self._target, self._drafts = None, dict[str, Any]()
        target = Path(models.target_openvino or "")
        if paths & {"openvino", "openvino-alone", "openvino-prompt-lookup"}:
            from fastdraft_hf.decode.openvino import OpenVINODecoder

            if "openvino-alone" in paths:
                self._pipelines["openvino-alone"] = OpenVINODecoder(target)
            for one in settings:
                if one.path == "openvino" and one.name not in self._pipelines:
                    self._pipelines[one.name] = OpenVINODecoder(target, Path(drafts[one.draft]))
            if "openvino-prompt-lookup" in paths:
                lookup = OpenVINODecoder(target, prompt_lookup=True)
                self._pipelines["openvino-prompt-lookup"] = lookup
        if paths & {"ours-openvino", "ours-openvino-alone"}:
            from optimum.intel import OVModelForCausalLM

            from fastdraft_hf.decode.openvino_paged import paged

            self._target = OVModelForCausalLM.from_pretrained(target, compile=False)
            # Going into pages lets the target's own compiled graph go, once. Done here, and not by
            # the first answer with a draft: the target alone would compile it again while timed.
            if "ours-openvino" in paths:
                paged(self._target)
            # Our loop without drafting is a setting of the path too, and belongs to the run's own.
            for name in sorted({s.draft for s in settings if s.path == "ours-openvino"}):
                # The loop compiles what it runs; nobody calls a draft by itself.
                self._drafts[name] = OVModelForCausalLM.from_pretrained(drafts[name], compile=False)

    def decode(
        self, setting: Setting, prompt: EvaluationPrompt, max_new_tokens: int
    ) -> DecodingRecord:
        from fastdraft_hf.decode.assisted import decode

        given: dict[str, Any] = {
            "task": prompt.task,
            "key": prompt.key,
            "max_new_tokens": max_new_tokens,
            "temperature": 0.0,
            "seed": self._seed,
            "num_assistant_tokens": setting.num_assistant_tokens,
        }
        if setting.name in self._pipelines:
            pipeline = self._pipelines[setting.name]
            record: DecodingRecord = pipeline.decode(prompt.ids, stop_ids=self._stop_ids, **given)
            return record
        assert self._target is not None
        draft = self._drafts[setting.draft] if setting.path == "ours-openvino" else None
        record = decode(self._target, prompt.ids, draft=draft, path="ours", **given)
        record.path = "ours-openvino"
        return record
