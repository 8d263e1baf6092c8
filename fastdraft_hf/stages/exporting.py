"""Measure what an export costs a draft in acceptance.

Compression changes a draft's distribution. The target writes a few texts, and each form of the
draft is scored along them: how many of its tokens would have been accepted, exact in expectation,
with one forward pass per text (`fastdraft_hf.eval.expected`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft_hf.export import parity

# Prompts of the texts; none of them is an evaluation prompt.
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
    """The expected acceptance of one form of a draft.

    Attributes:
        name: the form.
        acceptance_rate: expected accepted tokens per drafted token.
        block_efficiency: expected tokens per forward pass of the target.
    """

    name: str
    acceptance_rate: float
    block_efficiency: float


@dataclass(frozen=True)
class AcceptanceReading:
    """The expected acceptance of every form of a draft along the same texts.

    Attributes:
        texts, tokens: the target's texts, and their tokens.
        temperature: of the texts and of the acceptance.
        num_assistant_tokens: γ.
        drafts: the forms, the uncompressed one first.
    """

    texts: int
    tokens: int
    temperature: float
    num_assistant_tokens: int
    drafts: tuple[DraftAcceptance, ...]

    def lines(self) -> list[str]:
        """Return the result for a terminal."""
        width = max(len(one.name) for one in self.drafts)
        head = (
            f"expected acceptance rate (γ = {self.num_assistant_tokens}, T = {self.temperature:g}, "
            f"{self.texts} texts of the target, {self.tokens} tokens):"
        )
        rows = [
            f"  {one.name:<{width}}  {one.acceptance_rate:.3f}, "
            f"{one.block_efficiency:.2f} tokens per pass of the target"
            for one in self.drafts
        ]
        return [head, *rows]

    def facts(self) -> dict[str, Any]:
        """Return the result for a record."""
        return dataclasses.asdict(self)


def load_pytorch(folder: Path) -> Any:
    """Return a model in float32, with its reduced vocabulary if it has one."""
    import torch

    from fastdraft_hf.draft.reduced_vocabulary import load_draft

    return load_draft(folder, dtype=torch.float32).eval()


def load_exported(model: Path, exported: Path) -> Any:
    """Return an exported draft as users run it; ``model`` is the folder it was made from."""
    if exported.is_file():
        return parity.read_gguf(model, exported)
    from optimum.intel import OVModelForCausalLM

    return OVModelForCausalLM.from_pretrained(exported)


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
    """Let the target write texts and return the expected acceptance of each form of a draft.

    Args:
        target: the target's folder.
        drafts: name of a form -> how to load it; one is in memory at a time.
        ends: the target's end tokens.
        texts: number of texts, at most one per prompt.
        temperature: above 0; of the texts and of the acceptance.
        num_assistant_tokens: γ.
        seed: of the sampling.
        device: the target's, cpu or cuda; drafts stay where they were loaded.
    """
    from fastdraft_hf.eval.expected import (
        expected_rounds,
        rounds_acceptance_rate,
        rounds_block_efficiency,
        text_acceptance,
    )
    from fastdraft_hf.target.resolve import load_tokenizer

    tokenizer = load_tokenizer(target, "target")
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
    """Return the target's completions, sampled in one batch and cut after their first end token."""
    import torch
    from transformers import set_seed

    from fastdraft_hf.eval.expected import Continuation

    rows = [ids for text in prompts if (ids := tokenizer(text)["input_ids"])]
    width, pad = max(map(len, rows)), min(ends)
    padded = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    set_seed(seed)
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
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
