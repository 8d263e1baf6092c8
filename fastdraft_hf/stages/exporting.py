"""Exports that are checked before they are handed over, and what they cost a draft in acceptance.

Compression changes a draft's distribution, and acceptance is what a draft is for. So the target
writes a few texts, and the draft before and after compression says how many of its tokens would
have been accepted along them (`evaluation.expected`: exact in expectation, one pass a text).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.export import gguf as gguf_export
from fastdraft_hf.export import openvino as openvino_export
from fastdraft_hf.export import parity
from fastdraft_hf.export.gguf import GGUFType
from fastdraft_hf.export.openvino import WeightFormat

# Prompts of the texts that acceptance is read on; with the prompts of `parity`, and no evaluation
# prompt among them.
PROMPTS = (
    *parity.PROMPTS,
    "Question: Why does bread rise in the oven?\nAnswer:",
    "Dear neighbours,\n\nnext Saturday we will",
    "import csv\n\n\ndef read_prices(path):\n",
    "Three things are worth packing for a week in the mountains:",
)
NEW_TOKENS = 48


@dataclass(frozen=True)
class DraftAcceptance:
    """Expected acceptance of one form of a draft, along texts the target wrote.

    Attributes:
        name: which form.
        acceptance_rate: expected accepted / drafted tokens.
        block_efficiency: expected tokens a forward pass of the target.
    """

    name: str
    acceptance_rate: float
    block_efficiency: float


@dataclass(frozen=True)
class AcceptanceReading:
    """What was read and what came out.

    Attributes:
        texts, tokens: of the target.
        temperature: at which they were written and are read.
        num_assistant_tokens: γ.
        drafts: every form of the draft, the uncompressed one first.
    """

    texts: int
    tokens: int
    temperature: float
    num_assistant_tokens: int
    drafts: tuple[DraftAcceptance, ...]

    def lines(self) -> list[str]:
        """Return the findings for a terminal."""
        width = max(len(one.name) for one in self.drafts)
        head = (
            f"expected acceptance rate (γ = {self.num_assistant_tokens}, T = {self.temperature:g}, "
            f"{self.texts} texts of the target, {self.tokens} tokens):"
        )
        rows = [
            f"  {one.name:<{width}}  {one.acceptance_rate:.3f}, "
            f"{one.block_efficiency:.2f} tokens a pass of the target"
            for one in self.drafts
        ]
        return [head, *rows]

    def facts(self) -> dict[str, Any]:
        """Return the findings for a record."""
        return dataclasses.asdict(self)


def checked_openvino(
    model: Path, output: Path, weight_format: WeightFormat, *, check: bool = True
) -> parity.Parity | None:
    """Export to a folder that appears once it is checked.

    Args:
        model: a folder that ``from_pretrained`` reads.
        output: the folder to make; it must not exist.
        weight_format: how weights are stored. fp32 must agree with PyTorch; of the others the
            differences are only told.
        check: compare with PyTorch; ``None`` is returned without it.

    Raises:
        FastDraftError: ``output`` exists, the export fails, or fp32 does not agree.
    """
    _make_room(output)
    unchecked = output.with_name(f".{output.name}.unchecked")
    shutil.rmtree(unchecked, ignore_errors=True)  # of a killed run
    openvino_export.export_openvino(model, unchecked, weight_format)
    found = check_openvino(model, unchecked, weight_format) if check else None
    os.rename(unchecked, output)
    return found


def check_openvino(model: Path, exported: Path, weight_format: WeightFormat) -> parity.Parity:
    """Compare an export with PyTorch.

    Raises:
        FastDraftError: it is fp32 and does not agree. The folder stays where it is.
    """
    found = parity.compare_openvino(model, exported)
    return _agreeing(found, weight_format == "fp32", f"the export in {exported}")


def checked_gguf(
    model: Path, output: Path, weight_type: GGUFType, *, check: bool = True
) -> parity.Parity | None:
    """Export to a file that appears once it is checked; otherwise as `checked_openvino`."""
    _make_room(output)
    # transformers knows a GGUF file by its ending.
    unchecked = output.with_name(f".unchecked-{output.stem}.gguf")
    unchecked.unlink(missing_ok=True)
    gguf_export.export_gguf(model, unchecked, weight_type)
    found = check_gguf(model, unchecked, weight_type) if check else None
    os.rename(unchecked, output)
    return found


def check_gguf(model: Path, file: Path, weight_type: GGUFType) -> parity.Parity:
    """Read a GGUF file back through transformers and compare; f32 must agree.

    Raises:
        FastDraftError: it is f32 and does not agree. The file stays where it is.
    """
    found = parity.compare_gguf(model, file)
    return _agreeing(found, weight_type == "f32", f"{file}, read back,")


def _make_room(output: Path) -> None:
    if output.exists():
        raise FastDraftError(f"{output} exists; move it away or give another --output")
    output.parent.mkdir(parents=True, exist_ok=True)


def _agreeing(found: parity.Parity, must: bool, what: str) -> parity.Parity:
    if must and not found.exact:
        raise FastDraftError(f"{what} does not say what PyTorch does: " + "; ".join(found.lines()))
    return found


def load_pytorch(folder: Path) -> Any:
    """Return a model in float32; a reduced vocabulary of a draft is used as such."""
    import torch

    from fastdraft_hf.draft.reduced_vocabulary import load_draft

    return load_draft(folder, dtype=torch.float32).eval()


def load_openvino(folder: Path) -> Any:
    """Return an exported draft as users run it: at the precision that is this machine's default."""
    from optimum.intel import OVModelForCausalLM

    return OVModelForCausalLM.from_pretrained(folder)


def read_acceptance(
    target: Path,
    drafts: Mapping[str, Callable[[], Any]],
    *,
    ends: Collection[int],
    texts: int = len(PROMPTS),
    temperature: float = 0.6,
    num_assistant_tokens: int = 3,
    seed: int = 0,
    device: str = "cpu",
) -> AcceptanceReading:
    """Let the target write a few texts and every form of the draft say what it would have had.

    Args:
        target: the target's folder.
        drafts: name of a form -> how to load it; one is in memory at a time.
        ends: the target's end tokens.
        texts: how many, at most as many as there are prompts.
        temperature: above 0; of the texts and of the reading.
        num_assistant_tokens: γ.
        seed: of the sampling.
        device: cpu or cuda, of the target; drafts are read where they were loaded.
    """
    from transformers import AutoTokenizer

    from fastdraft_hf.eval.expected import (
        expected_rounds,
        rounds_acceptance_rate,
        rounds_block_efficiency,
        text_acceptance,
    )

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = load_pytorch(target).to(device)
    written = write_texts(
        model, tokenizer, PROMPTS[:texts], ends=ends, temperature=temperature, seed=seed
    )
    found = []
    for name, load in drafts.items():
        draft = load()
        rounds = [
            expected_rounds(
                text_acceptance(model, draft, text, temperature, ends),
                num_assistant_tokens,
                NEW_TOKENS,
            )
            for text in written
        ]
        del draft
        found.append(
            DraftAcceptance(name, rounds_acceptance_rate(rounds), rounds_block_efficiency(rounds))
        )
    return AcceptanceReading(
        len(written),
        sum(len(text.ids) for text in written),
        temperature,
        num_assistant_tokens,
        tuple(found),
    )


def write_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    ends: Collection[int],
    temperature: float,
    seed: int,
) -> list[Any]:
    """Return what the target writes after each prompt, in one batch, cut at its first end token."""
    import torch
    from transformers import set_seed

    from fastdraft_hf.eval.expected import Continuation

    rows = [ids for text in prompts if (ids := tokenizer(text)["input_ids"])]
    width, pad = max(map(len, rows)), min(ends)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    set_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
        )
    texts = []
    for row, tokens in zip(rows, output[:, width:].tolist(), strict=True):
        last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        texts.append(Continuation("export", tuple(row), tuple(tokens[: last + 1])))
    return texts
