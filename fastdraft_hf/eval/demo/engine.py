"""The target and the draft of a demonstration, found, checked and loaded for one engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._extras import openvino_available
from fastdraft_hf.decode.live import LiveText, decode_live
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.decode.settings import read_draft_tokens
from fastdraft_hf.eval.demo.config import DemoConfig
from fastdraft_hf.export.openvino import WeightFormat, cached_openvino, require_openvino

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = "SmolLM2-135M-Instruct-FastDraft"
WEIGHT_FORMAT: WeightFormat = "int8"
# γ of a draft that was not measured: the paper's.
_UNMEASURED = 3


def shipped_draft() -> Path:
    """Return the folder of the draft that lies in the repository.

    Raises:
        FastDraftError: it is not there; the error says how to come by one.
    """
    cards = Path(__file__).resolve().parents[3] / "model_cards"
    folder = cards / SHIPPED
    if (folder / "config.json").is_file():
        return folder
    if not (cards / "template.md").is_file():
        raise FastDraftError(
            "draft: this installation has no draft of its own, only a clone of the repository "
            f"does (model_cards/{SHIPPED}); give --draft, such as the folder that `fastdraft pull` "
            "prints"
        )
    raise FastDraftError(
        f"draft: there is no {folder} yet; make it with `fastdraft run "
        f"recipes/smollm2-135m/full.yaml` and `fastdraft ship RUN --to model_cards/{SHIPPED}`, or "
        "give --draft"
    )


def choose_engine(wanted: str, device: str) -> str:
    """Return ``openvino`` or ``transformers``.

    Args:
        wanted: of `DemoConfig.engine`.
        device: cpu or cuda.

    Raises:
        FastDraftError: OpenVINO was asked for and is not installed.
    """
    if wanted == "openvino":
        require_openvino()
    if wanted != "auto":
        return wanted
    return "openvino" if device == "cpu" and openvino_available() else "transformers"


def check_draft(target: Path, tokenizer: PreTrainedTokenizerBase, draft: Path) -> None:
    """Refuse a draft that cannot draft for the target.

    Raises:
        FastDraftError: it cannot be read, or its vocabulary or number of scores is another.
    """
    from fastdraft_hf.draft.vocabulary import Vocabulary, check_vocabulary

    check_vocabulary(Vocabulary.of_folder(target, "the target", tokenizer), draft, "draft")


@dataclass
class Engine:
    """Two models that are ready to write.

    Attributes:
        title: what runs them, in words.
        target, draft: the models.
        tokenizer: the target's.
        num_assistant_tokens: γ.
        threads: entered around every answer, of either side.
    """

    title: str
    target: Any
    draft: Any
    tokenizer: PreTrainedTokenizerBase
    num_assistant_tokens: int
    threads: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def answer(
        self,
        ids: Sequence[int],
        config: DemoConfig,
        *,
        key: str,
        with_draft: bool,
        changed: Callable[[LiveText], None] | None = None,
        max_new_tokens: int | None = None,
    ) -> tuple[DecodingRecord, LiveText]:
        """Write one answer; see `decode_live`."""
        with self.threads():
            return decode_live(
                self.target,
                self.tokenizer,
                ids,
                key=key,
                max_new_tokens=max_new_tokens or config.max_new_tokens,
                temperature=config.temperature,
                seed=config.seed,
                draft=self.draft if with_draft else None,
                num_assistant_tokens=self.num_assistant_tokens if with_draft else 0,
                changed=changed,
            )

    def margin(self, ids: Sequence[int]) -> float:
        """Return how far the target's first choice after ``ids`` lies above its second, in logits.

        Through ``generate``, as either engine has it.
        """
        import torch

        inputs = torch.tensor([list(ids)], device=self.target.device)
        with torch.inference_mode(), self.threads():
            output = self.target.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=1,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        first, second = output.logits[0][0].float().topk(2).values.tolist()
        return float(first - second)


def load_engine(
    name: str,
    target: Path,
    draft: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: DemoConfig,
    *,
    ends: Collection[int],
    device: str,
    exported: Path | None = None,
    busy: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Engine:
    """Load both models.

    Args:
        name: ``openvino`` or ``transformers``.
        target, draft: folders of checkpoints; the draft's may be an OpenVINO export.
        tokenizer: the target's.
        config: the demonstration's.
        ends: tokens that end an answer.
        device: cpu or cuda, of transformers.
        exported: the draft's int8 export, where a run made one.
        busy: entered with a line of text around what takes a while.

    Raises:
        FastDraftError: the draft is an export and the engine cannot read it.
    """
    is_export = (draft / "openvino_model.xml").is_file()
    if name == "openvino":
        given = draft if is_export else exported
        engine = _openvino(target, given, draft, tokenizer, busy)
    elif is_export:
        raise FastDraftError(
            f"draft: {draft} is an OpenVINO export; engine transformers wants the draft's PyTorch "
            "folder"
        )
    else:
        engine = _transformers(target, draft, tokenizer, device, busy)
    if config.num_assistant_tokens is not None:
        engine.num_assistant_tokens = config.num_assistant_tokens
    engine.target.generation_config.eos_token_id = sorted(ends)
    if engine.target.generation_config.pad_token_id is None:
        engine.target.generation_config.pad_token_id = min(ends)
    return engine


def _openvino(
    target: Path,
    exported: Path | None,
    draft: Path,
    tokenizer: PreTrainedTokenizerBase,
    busy: Callable[[str], contextlib.AbstractContextManager[Any]],
) -> Engine:
    with busy(f"exporting to OpenVINO {WEIGHT_FORMAT} (once for each model)"):
        target_folder = cached_openvino(target, WEIGHT_FORMAT)
        draft_folder = exported or cached_openvino(draft, WEIGHT_FORMAT)
    from optimum.intel import OVModelForCausalLM

    from fastdraft_hf.decode.speculative import one_torch_thread

    # The target alone gets what our loop gives itself beside OpenVINO: no threads in its way.
    with busy("compiling both models"):
        ours, drafts = (
            OVModelForCausalLM.from_pretrained(str(folder))
            for folder in (target_folder, draft_folder)
        )
    gamma = read_draft_tokens(draft_folder) or read_draft_tokens(draft) or _UNMEASURED
    title = f"OpenVINO {WEIGHT_FORMAT}"
    return Engine(title, ours, drafts, tokenizer, gamma, threads=one_torch_thread)


def _transformers(
    target: Path,
    draft: Path,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    busy: Callable[[str], contextlib.AbstractContextManager[Any]],
) -> Engine:
    import torch
    from transformers import AutoModelForCausalLM

    from fastdraft_hf.draft.reduced_vocabulary import load_draft

    # What a user of either device runs: float32 has the fastest kernels of most CPUs.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with busy("loading both models"):
        ours = AutoModelForCausalLM.from_pretrained(
            target, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        theirs = load_draft(draft, dtype=dtype)
    gamma = read_draft_tokens(draft) or _UNMEASURED
    words = "bfloat16 on the GPU" if device == "cuda" else "float32"
    return Engine(
        f"transformers, {words}",
        ours.to(device).eval(),
        theirs.to(device).eval(),
        tokenizer,
        gamma,
    )
