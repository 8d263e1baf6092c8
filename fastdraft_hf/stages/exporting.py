"""Measure what an export costs a draft in acceptance.

Compression changes a draft's distribution. The target writes a few texts, and each form of the
draft is scored along them: how many of its tokens would have been accepted, exact in expectation,
with one forward pass per text (`fastdraft_hf.eval.expected`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
    texts: int = len(PROMPTS),
    temperature: float = 0.6,
    num_assistant_tokens: int = 3,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Let the target write texts and return the expected acceptance of each form of a draft.

    Args:
        target: the target's folder.
        drafts: name of a form -> how to load it; one is in memory at a time.
        texts: number of texts, at most one per prompt.
        temperature: above 0; of the texts and of the acceptance.
        num_assistant_tokens: γ.
        seed: of the sampling.
        device: the target's, cpu or cuda; drafts stay where they were loaded.

    Returns:
        ``texts`` and ``tokens`` of the target, ``temperature``, ``num_assistant_tokens``, and
        ``drafts``: of each form the ``name``, ``acceptance_rate`` (accepted per drafted token) and
        ``block_efficiency`` (tokens per forward pass of the target).
    """
    from fastdraft_hf.draft.reduced_vocabulary import load_draft
    from fastdraft_hf.eval import expected
    from fastdraft_hf.target.resolve import load_tokenizer, stop_ids

    tokenizer = load_tokenizer(target, "target")
    ends = stop_ids(target, tokenizer)
    model = load_draft(target, dtype="float32").to(device)
    written = _write_texts(model, tokenizer, PROMPTS[:texts], ends, temperature, seed)
    found = []
    for name, load in drafts.items():
        draft = load()
        read = [expected.text_acceptance(model, draft, text, temperature, ends) for text in written]
        del draft
        rounds = [expected.expected_rounds(one, num_assistant_tokens, NEW_TOKENS) for one in read]
        found.append(
            {
                "name": name,
                "acceptance_rate": expected.rounds_acceptance_rate(rounds),
                "block_efficiency": expected.rounds_block_efficiency(rounds),
            }
        )
    return {
        "texts": len(written),
        "tokens": sum(len(text.ids) for text in written),
        "temperature": temperature,
        "num_assistant_tokens": num_assistant_tokens,
        "drafts": found,
    }


def acceptance_lines(reading: Mapping[str, Any]) -> list[str]:
    """Return the result of `read_acceptance` for a terminal."""
    width = max(len(one["name"]) for one in reading["drafts"])
    head = (
        f"expected acceptance rate (γ = {reading['num_assistant_tokens']}, T = "
        f"{reading['temperature']:g}, {reading['texts']} texts of the target, {reading['tokens']} "
        "tokens):"
    )
    return [head] + [
        f"  {one['name']:<{width}}  {one['acceptance_rate']:.3f}, "
        f"{one['block_efficiency']:.2f} tokens per pass of the target"
        for one in reading["drafts"]
    ]


def _write_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
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
