"""Compare an exported model with PyTorch: logits, and greedy text.

Both run in float32 (`EXACT`). On a CPU with bfloat16 OpenVINO rounds by default and has an 8-bit KV
cache, which is a property of that machine and not of the file.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from fastdraft_hf._atomic import write_json
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._ties import LOGIT_TOLERANCE, Margin, first_difference
from fastdraft_hf.draft.reduced_vocabulary import read_reduced_vocabulary
from fastdraft_hf.export.gguf import export_gguf
from fastdraft_hf.export.openvino import LOWEST, export_openvino, score_only
from fastdraft_hf.target.resolve import load_tokenizer

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}

# Prompts to continue; none of them is an evaluation prompt.
PROMPTS = (
    "The harbour was quiet that morning, and",
    "def running_mean(values, width):\n    ",
    "To make a simple vegetable soup, first",
    "Der Zug nach Norden fährt um 12:45 Uhr und",
)


@dataclass(frozen=True)
class Parity:
    """The result of a comparison.

    Attributes:
        positions: token positions whose logits were compared.
        max_logit_difference: the largest difference of a logit.
        logit_size: PyTorch's largest absolute logit.
        same_best: share of positions with the same most probable token.
        texts: number of greedy texts.
        same_texts: of these, the ones that are equal.
        ties: the ones that first differ at a near-tie of PyTorch's logits.
    """

    positions: int
    max_logit_difference: float
    logit_size: float
    same_best: float
    texts: int
    same_texts: int
    ties: int

    @property
    def exact(self) -> bool:
        """Whether the rounding of two kernels of one precision explains every difference."""
        close = self.max_logit_difference <= LOGIT_TOLERANCE * max(self.logit_size, 1.0)
        return close and self.same_texts + self.ties == self.texts

    def lines(self) -> list[str]:
        """Return the result for a terminal."""
        return [
            f"logits: largest difference {self.max_logit_difference:.2g} at logits up to "
            f"{self.logit_size:.3g}, same best token at {self.same_best:.1%} of {self.positions} "
            "positions",
            f"greedy text: {self.same_texts} of {self.texts} the same, {self.ties} differ at a "
            "near-tie",
        ]


def compare(model: Any, other: Any, prompts: Sequence[list[int]], new_tokens: int = 24) -> Parity:
    """Compare a PyTorch model with another form of it.

    Args:
        model: the PyTorch model.
        other: the other form; both are called, and generate, as transformers' models.
        prompts: token ids to continue. Logits are compared along PyTorch's own greedy texts.
        new_tokens: length of a continuation.
    """
    difference = size = 0.0
    positions = best = same = ties = 0
    with torch.inference_mode():
        for prompt in prompts:
            own = _greedy(model, prompt, new_tokens)
            text = torch.tensor([[*prompt, *own]])
            inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
            ours = model(**inputs).logits[0].float()
            theirs = torch.as_tensor(other(**inputs).logits)[0].float()
            difference = max(difference, float((ours - theirs).abs().max()))
            # The tokens that a reduced vocabulary leaves out have no logits.
            largest = float(ours[ours > LOWEST].abs().max())
            size = max(size, largest)
            best += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            positions += len(ours)
            written = _greedy(other, prompt, new_tokens)
            at = first_difference(own, written)
            same += at is None
            if at is not None and at < min(len(own), len(written)):  # else one ended early
                logits = ours[len(prompt) + at - 1]
                ties += Margin(float(logits[own[at]] - logits[written[at]]), largest).tie
    return Parity(positions, difference, size, best / positions, len(prompts), same, ties)


def compare_export(model: Path, exported: Path) -> Parity:
    """Compare a Hugging Face folder with its OpenVINO folder or GGUF file, both in float32."""
    ours = _load(model)
    if exported.is_file():
        theirs = read_gguf(model, exported)
    else:
        from optimum.intel import OVModelForCausalLM

        head = read_reduced_vocabulary(model)
        if head is not None:
            score_only(ours, head)
        theirs = OVModelForCausalLM.from_pretrained(exported, ov_config=EXACT)
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    return compare(ours, theirs, [ids for ids in prompts if ids])


def checked_export(
    model: Path, output: Path, weight_format: Any, *, check: bool = True, record: Path | None = None
) -> Parity | None:
    """Export to ``output``, which appears when it has been compared with PyTorch.

    Args:
        model: a folder that ``from_pretrained`` reads.
        output: the OpenVINO folder or, ending in ``.gguf``, the GGUF file to make.
        weight_format: how weights are stored. float32 must agree with PyTorch; for the others the
            differences are returned.
        check: whether to compare; without it ``None`` is returned.
        record: a JSON file for the differences.

    Raises:
        FastDraftError: the export fails, or float32 does not agree.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    unchecked = output.with_name(f".unchecked-{output.name}")
    if output.suffix == ".gguf":  # transformers knows a GGUF file by its ending
        export_gguf(model, unchecked, weight_format)
    else:
        shutil.rmtree(unchecked, ignore_errors=True)  # left by a killed run
        export_openvino((model, unchecked, weight_format))
    found = compare_export(model, unchecked) if check else None
    if found is not None:
        if weight_format in ("fp32", "f32") and not found.exact:
            raise FastDraftError(f"{unchecked} differs from PyTorch: " + "; ".join(found.lines()))
        if record is not None:
            write_json(record, vars(found))
    os.rename(unchecked, output)
    return found


def read_gguf(model: Path, file: Path) -> Any:
    """Return the model of a GGUF file, its weights dequantized to float32.

    The config is that of the folder it was made from, because transformers' reader leaves some of
    it out (head size, rope scaling). In GGUF a Mistral is a Llama.
    """
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if config.model_type == "mistral":
        own = {"model_type", "architectures", "sliding_window"}
        config = LlamaConfig(**{k: v for k, v in config.to_dict().items() if k not in own})
    return _load(file.parent, gguf_file=file.name, config=config)


def _load(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, **options
    )
    return model.eval()


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "pad_token_id": 0}
    found: list[int] = model.generate(ids, do_sample=False, **given)[0, len(prompt) :].tolist()
    return found
