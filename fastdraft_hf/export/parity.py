"""Compare an exported model with PyTorch: logits, and greedy text.

Both run in float32 (`EXACT`). On a CPU with bfloat16 OpenVINO rounds by default and has an 8-bit KV
cache, which is a property of that machine and not of the file.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._sequences import first_difference
from fastdraft_hf._ties import LOGIT_TOLERANCE, Margin
from fastdraft_hf.draft.reduced_vocabulary import read_reduced_vocabulary
from fastdraft_hf.export.gguf import export_gguf
from fastdraft_hf.export.openvino import export_openvino
from fastdraft_hf.export.reduced_vocabulary import LOWEST
from fastdraft_hf.target.resolve import load_tokenizer

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}

# Prompts to continue; none of them is an evaluation prompt.
PROMPTS = (
    "The harbour was quiet that morning, and",
    "def running_mean(values, width):\n    ",
    "To make a simple vegetable soup, first",
    "Der Zug nach Norden fährt um 12:45 Uhr und",
)


class Parting(NamedTuple):
    """Where a greedy text first differs from PyTorch's, at PyTorch's margin of its own token."""

    prompt: int
    place: int
    margin: float
    tie: bool


@dataclass(frozen=True)
class Parity:
    """The result of a comparison.

    Attributes:
        positions: token positions whose logits were compared.
        max_logit_difference: the largest difference of a logit.
        logit_size: PyTorch's largest absolute logit.
        same_best: share of positions with the same most probable token.
        texts: number of greedy texts.
        partings: the greedy texts that differ.
    """

    positions: int
    max_logit_difference: float
    logit_size: float
    same_best: float
    texts: int
    partings: tuple[Parting, ...]

    @property
    def exact(self) -> bool:
        """Whether the rounding of two kernels of one precision explains every difference."""
        close = self.max_logit_difference <= LOGIT_TOLERANCE * max(self.logit_size, 1.0)
        return close and all(parting.tie for parting in self.partings)

    def lines(self) -> list[str]:
        """Return the result for a terminal."""
        same = self.texts - len(self.partings)
        found = [
            f"logits: largest difference {self.max_logit_difference:.2g} at logits up to "
            f"{self.logit_size:.3g}, same best token at {self.same_best:.1%} of {self.positions} "
            "positions",
            f"greedy text: {same} of {self.texts} the same",
        ]
        for parting in self.partings:
            found.append(
                f"  text {parting.prompt} differs from token {parting.place}, PyTorch's margin "
                f"there {parting.margin:.2g}{' (a tie)' if parting.tie else ''}"
            )
        return found

    def facts(self) -> dict[str, Any]:
        """Return the result for a record."""
        return {**vars(self), "partings": [parting._asdict() for parting in self.partings]}


def compare(model: Any, other: Any, prompts: Sequence[list[int]], new_tokens: int = 24) -> Parity:
    """Compare a PyTorch model with another form of it.

    Args:
        model: the PyTorch model.
        other: the other form; both are called, and generate, as transformers' models.
        prompts: token ids to continue. Logits are compared along PyTorch's own greedy texts.
        new_tokens: length of a continuation.
    """
    import torch

    difference = size = 0.0
    positions = same = 0
    partings = []
    with torch.inference_mode():
        for number, prompt in enumerate(prompts):
            own = _greedy(model, prompt, new_tokens)
            text = torch.tensor([[*prompt, *own]])
            inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
            ours = model(**inputs).logits[0].float()
            theirs = torch.as_tensor(other(**inputs).logits)[0].float()
            difference = max(difference, float((ours - theirs).abs().max()))
            # The tokens that a reduced vocabulary leaves out have no logits.
            largest = float(ours[ours > LOWEST].abs().max())
            size = max(size, largest)
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            positions += len(ours)
            written = _greedy(other, prompt, new_tokens)
            place = first_difference(own, written)
            if place is None:
                continue
            margin = Margin(math.inf, largest)  # one text ended early: there is no margin
            if place < min(len(own), len(written)):
                at = ours[len(prompt) + place - 1]
                margin = Margin(float(at[own[place]] - at[written[place]]), largest)
            partings.append(Parting(number, place, margin.margin, margin.tie))
    return Parity(positions, difference, size, same / positions, len(prompts), tuple(partings))


def compare_export(model: Path, exported: Path) -> Parity:
    """Compare a Hugging Face folder with its OpenVINO folder or GGUF file, both in float32."""
    ours = _load(model)
    if exported.is_file():
        theirs = read_gguf(model, exported)
    else:
        from optimum.intel import OVModelForCausalLM

        head = read_reduced_vocabulary(model)
        if head is not None:
            _score_only(ours, head.token_ids)
        theirs = OVModelForCausalLM.from_pretrained(exported, ov_config=EXACT)
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    return compare(ours, theirs, [ids for ids in prompts if ids])


def check_export(model: Path, exported: Path, weight_format: str) -> Parity:
    """Compare an export with PyTorch; raise `FastDraftError` when float32 does not agree."""
    found = compare_export(model, exported)
    if weight_format in ("fp32", "f32") and not found.exact:
        raise FastDraftError(f"{exported} differs from PyTorch: " + "; ".join(found.lines()))
    return found


def checked_export(
    model: Path, output: Path, weight_format: Any, *, check: bool = True
) -> Parity | None:
    """Export to ``output``, which appears when it has been compared with PyTorch.

    Args:
        model: a folder that ``from_pretrained`` reads.
        output: the OpenVINO folder or, ending in ``.gguf``, the GGUF file to make. It must not
            exist.
        weight_format: how weights are stored. float32 must agree with PyTorch; for the others the
            differences are returned.
        check: whether to compare; without it ``None`` is returned.

    Raises:
        FastDraftError: the export fails, or float32 does not agree.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    gguf = output.suffix == ".gguf"  # transformers knows a GGUF file by its ending
    unchecked = output.with_name(f".unchecked-{output.name}")
    if gguf:
        unchecked.unlink(missing_ok=True)
        export_gguf(model, unchecked, weight_format)
    else:
        shutil.rmtree(unchecked, ignore_errors=True)  # left by a killed run
        export_openvino(model, unchecked, weight_format)
    found = check_export(model, unchecked, weight_format) if check else None
    os.rename(unchecked, output)
    return found


def read_gguf(model: Path, file: Path) -> Any:
    """Return the model of a GGUF file, its weights dequantized to float32.

    The config is that of the folder it was made from, because transformers' reader leaves some of
    it out (head size, rope scaling). In GGUF a Mistral is a Llama.
    """
    from transformers import AutoConfig, LlamaConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if config.model_type == "mistral":
        own = {"model_type", "architectures", "sliding_window"}
        config = LlamaConfig(**{k: v for k, v in config.to_dict().items() if k not in own})
    return _load(file.parent, gguf_file=file.name, config=config)


def _load(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, **options
    )
    return model.eval()


def _score_only(model: Any, token_ids: Sequence[int]) -> None:
    """Set every other logit to its value in an exported reduced vocabulary, in place."""
    import torch

    index = torch.tensor(list(token_ids))

    def scatter(module: Any, inputs: Any, output: Any) -> Any:
        whole = output.logits
        output.logits = torch.full_like(whole, LOWEST).index_copy_(
            -1, index, whole.index_select(-1, index)
        )
        return output

    model.register_forward_hook(scatter)


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "pad_token_id": 0}
    found: list[int] = model.generate(ids, do_sample=False, **given)[0, len(prompt) :].tolist()
    return found
